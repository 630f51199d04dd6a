"""What the npu:: operators compute, on CPU tensors, as the wheel describes them (_op_plugin_docs.py).

Agreement with these functions proves the order of calls, layouts and arguments, against our reading of those
descriptions; it does not prove what the chip does. The limits they state are enforced: a call that the real
operator would refuse, or answer with nonsense, is an OutsideLimits here.
"""

from npu_stand_in.reference.registry import REFERENCES, OutsideLimits

__all__ = ["REFERENCES", "OutsideLimits"]

from npu_stand_in.reference import attention, experts, layers, quantised, sampling  # noqa: F401
