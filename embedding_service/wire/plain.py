"""A message as dicts and lists, for JSON. Whole numbers stay numbers, and a field that is not set is there too."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def plain(message: Message) -> dict[str, Any]:
    """The fields of a message by their names. An enum's value is its name; `bytes` are hexadecimal digits."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(each, field) for each in value]
    if field.message_type and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: Any, field: FieldDescriptor) -> Any:
    if field.message_type:
        return plain(value)
    if field.enum_type:
        return field.enum_type.values_by_number[value].name
    return value.hex() if isinstance(value, bytes) else value
