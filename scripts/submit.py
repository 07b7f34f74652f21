"""Make the zip that the server of a benchmark takes, or say what is wrong with the predictions.

    python scripts/submit.py dataset=mevis_valid predictions=outputs/glus_s/mevis_valid output=outputs/mevis.zip

Predictions are PNGs or run-length codes. The zip appears only if every video, expression, frame and size is right. With
``lmms_eval=FILE``, a submission of lmms-eval for any model, it writes that with our answers instead: points, of which
lmms-eval's second stage makes masks by SAM 2.1, whose J&F is not comparable with others.
"""

from __future__ import annotations

from glus.config import SubmitConfig
from glus.config.jobs import Jobs
from glus.evaluation.submission import NOT_COMPARABLE, build_submission, write_lmms_eval


def submit(config: SubmitConfig) -> None:
    """Make the zip and say what is in it; errors as ``build_submission`` and ``write_lmms_eval``."""
    if config.lmms_eval:
        count = write_lmms_eval(config.dataset, config.predictions, config.lmms_eval, config.output)
        print(f"{config.output}: {count} records; {NOT_COMPARABLE}")
        return
    made = build_submission(config.dataset, config.predictions, config.output, config.num_workers)
    for doubt in made.doubts:
        print(f"warning: {doubt}")
    print(f"{made.path}: {made.num_masks} masks of {made.num_expressions} expressions in {made.num_videos} videos")


if __name__ == "__main__":
    Jobs("submit", SubmitConfig, "output", is_file=True).start(submit)
