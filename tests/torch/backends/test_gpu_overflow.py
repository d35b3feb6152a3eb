"""The GPU backend's kernels stop a group from growing past its dtype, as the other backends do."""

from typing import Any

import pytest

from support.interpreted import MARKS, patched_once
from support.overflow import CASES, assert_grows_as_far_as_it_fits

__all__ = ["patched_once"]

pytestmark = MARKS

GPU: Any = "gpu"


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_group_grows_as_far_as_its_dtype_allows(name: str, *, looks: bool) -> None:
    assert_grows_as_far_as_it_fits(name, GPU, looks=looks)
