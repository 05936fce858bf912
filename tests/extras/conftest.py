import pytest

import settings
from tests.extras.toy import TOY_PAIR


@pytest.fixture
def toy_pair(monkeypatch):
    """The pair tiny, in toy size."""
    monkeypatch.setitem(settings.PAIRS, "tiny", TOY_PAIR)
