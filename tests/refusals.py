"""How a refusal looks: one line that a user can act on."""

import pytest

from psycopref.config import StudyError


def one_line(action) -> str:
    """Return the message of the StudyError that `action` raises."""
    with pytest.raises(StudyError) as error:
        action()
    assert "\n" not in str(error.value) and str(error.value).strip()
    return str(error.value)
