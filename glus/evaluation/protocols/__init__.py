"""How each benchmark turns what was counted of its expressions into the numbers that papers report."""

from glus.config import Protocol
from glus.evaluation.protocols import images, long_rvos, mevis_v2, ref_davis17, revos
from glus.evaluation.protocols.rules import Rules

RULES: dict[Protocol, Rules] = {
    Protocol.jf: Rules("J&F: mean over all frames, then over expressions"),
    Protocol.mevis_v2: mevis_v2.RULES,
    Protocol.revos: revos.RULES,
    Protocol.ref_davis17: ref_davis17.RULES,
    Protocol.long_rvos: long_rvos.RULES,
    Protocol.images: images.RULES,
}
"""The rules by the name that a dataset's YAML gives."""

__all__ = ["RULES", "Rules"]
