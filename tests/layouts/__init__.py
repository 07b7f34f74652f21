"""Small valid datasets on disk in the layout of every benchmark, together with what is true of them.

``WRITERS[layout](root, split)`` writes a split as it is officially distributed and returns a ``Written``: its config
and, for each expression, the text, the masks, the group and the pixels to ignore that a reader must find. Everything is
drawn from disks and rectangles whose masks are computed here, not by the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glus.config import Layout
from tests.layouts.davis17 import write_ref_davis17
from tests.layouts.mask_dicts import write_lvvis, write_mevis, write_mevis_v2, write_ref_sav, write_revos
from tests.layouts.object_folders import write_long_rvos, write_reason_vos
from tests.layouts.pictures import write_reason_seg, write_refcoco
from tests.layouts.splits import Written
from tests.layouts.videos import SIZE, make_video
from tests.layouts.youtube_vos import write_groundmore, write_ref_youtube_vos, write_ref_youtube_vos_valid

__all__ = ["SIZE", "WRITERS", "Written", "make_video"]

WRITERS: dict[Layout, Callable[[Path, str], Written]] = {
    Layout.mevis: write_mevis,
    Layout.mevis_v2: write_mevis_v2,
    Layout.ref_youtube_vos: write_ref_youtube_vos,
    Layout.ref_youtube_vos_valid: write_ref_youtube_vos_valid,
    Layout.ref_davis17: write_ref_davis17,
    Layout.revos: write_revos,
    Layout.ref_sav: write_ref_sav,
    Layout.groundmore: write_groundmore,
    Layout.reason_vos: write_reason_vos,
    Layout.lvvis: write_lvvis,
    Layout.long_rvos: write_long_rvos,
    Layout.refcoco: write_refcoco,
    Layout.reason_seg: write_reason_seg,
}
