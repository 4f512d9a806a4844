"""How a refusal looks: one line that a user can act on."""

import pytest

from psycopref.core.settings import StudyError


def one_line(action) -> str:
    """Return the message of the StudyError that `action` raises."""
    with pytest.raises(StudyError) as error:
        action()
    assert "\n" not in str(error.value) and str(error.value).strip()
    return str(error.value)


def value_error(call, pattern: str, module: str | tuple[str, ...]) -> None:
    """Check the ValueError of a pure function: one line that begins with the module and says what was expected and
    what to do."""
    with pytest.raises(ValueError, match=pattern) as refused:
        call()
    message = str(refused.value)
    assert message.startswith(module) and "expected" in message and ";" in message and "\n" not in message
