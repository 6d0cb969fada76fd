"""Numbers near the ends of their precision, and where the first NaN comes from."""

from lsp_callbacks.functional.numerics.first_fault import Fault, first_fault
from lsp_callbacks.functional.numerics.numeric_range import NumericRange, headroom, lost_share, numeric_range

__all__ = [
    "Fault",
    "NumericRange",
    "first_fault",
    "headroom",
    "lost_share",
    "numeric_range",
]
