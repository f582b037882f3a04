"""The extension carries no symbols: they would be most of a wheel."""

import os

from infini_attn import _core


def test_the_extension_is_stripped():
    assert os.path.getsize(_core.__file__) < 6e6
