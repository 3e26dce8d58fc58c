"""From conversations in JSONL to packed token ids and loss masks. No torch here."""
