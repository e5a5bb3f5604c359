"""Property strings as vzdump writes them: `enabled=1,storage=local`. Pure."""

_TRUE = ("1", "on", "yes", "true")
_FALSE = ("0", "off", "no", "false")

FLEECING_ALLOWED = (
    '"enabled=1", "enabled=1,storage=NAME" or "enabled=0", or a table {enabled = true, storage = "NAME"}'
)


def parse_fleecing_properties(text: str) -> dict[str, bool | str]:
    """Return `enabled` and `storage` as far as `text` gives them. ValueError says what is wrong.

    As with vzdump, `enabled=` may be left out: "1,storage=local".
    """
    found: dict[str, bool | str] = {}
    for position, part in enumerate(text.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and position == 0 and key.lower() in _TRUE + _FALSE:
            key, value = "enabled", key
        elif not equals or not value:
            raise ValueError(f"{text!r}: {part!r} is no property; allowed: {FLEECING_ALLOWED}")
        if key in found:
            raise ValueError(f"{text!r} gives {key} twice; allowed: {FLEECING_ALLOWED}")
        if key == "storage":
            found[key] = value
        elif key == "enabled":
            found[key] = _parse_boolean(text, value)
        else:
            raise ValueError(f"{text!r}: {key!r} is not known; allowed: {FLEECING_ALLOWED}")
    return found


def _parse_boolean(text: str, value: str) -> bool:
    if value.lower() not in _TRUE + _FALSE:
        raise ValueError(f"{text!r}: enabled is {value!r}; allowed: 1 or 0")
    return value.lower() in _TRUE
