"""Images that stand beside a record's messages → parts of the messages."""

from __future__ import annotations

from typing import Any

from ms4.data.faults import SampleFault


def with_images(messages: Any, images: Any) -> Any:
    """Put a record's `images` where the messages say `<image>` or have an image part without a
    source; without either, before the first user's text.

    Raises:
        SampleFault: there are more images than places, or fewer.
    """
    if not isinstance(images, list):
        images = [images]
    if not isinstance(messages, list):
        return messages  # the checks of messages will say so
    waiting = list(images)
    placed = [_place(message, waiting) for message in messages]
    if len(waiting) == len(images):
        for index, message in enumerate(placed):
            if isinstance(message, dict) and message.get("role") == "user":
                content = message.get("content")
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                if isinstance(parts, list):
                    placed[index] = {**message, "content": [*map(_image_part, images), *parts]}
                return placed
    if waiting:
        raise SampleFault(
            f"{len(images)} images, of which the messages place {len(images) - len(waiting)} "
            "(`<image>`); place all of them"
        )
    return placed


def _image_part(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _place(message: Any, waiting: list[Any]) -> Any:
    if not isinstance(message, dict) or message.get("role") != "user":
        return message
    content = message.get("content")
    if not isinstance(content, (str, list)):
        return message
    parts: list[Any] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str) and "<image>" in part["text"]:
            for number, piece in enumerate(part["text"].split("<image>")):
                parts += [_image_part(_next(waiting))] if number else []
                parts += [{"type": "text", "text": piece}] if piece.strip() else []
        elif kind == "image" and not any(value for key, value in part.items() if key != "type"):
            parts.append(_image_part(_next(waiting)))
        else:
            parts.append(part)
    return {**message, "content": parts} if parts else message


def _next(waiting: list[Any]) -> Any:
    if not waiting:
        raise SampleFault("more places for images than `images`; add them or remove the places")
    return waiting.pop(0)
