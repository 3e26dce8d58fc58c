"""ms4: fine-tune Mistral Small 4 on the hardware you have."""

import logging

__version__ = "0.1.0"

# On some CPUs bitsandbytes warns at import that an optional inference kernel from the hub is not
# installed. Nothing here uses it, and the advice would mislead; peft imports it before we do.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
