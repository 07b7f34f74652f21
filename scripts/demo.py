"""Serve a web page that segments what sentences describe in a video or picture; needs ``pip install 'glus[demo]'``.

    python scripts/demo.py --weights glus_shapes

Visitors are served one after another by one model. The page is for this machine alone, unless ``--host 0.0.0.0``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from glus.config.jobs import user_errors, user_path
from glus.inference.demo import build_demo
from glus.inference.segment import load
from glus.log import setup_logging


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=user_path, default=Path("glus_shapes"), help="as of segment_video.py")
    parser.add_argument("--allow-cpu", action="store_true", help="run a model of the full size though there is no GPU")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; serves until Ctrl-C."""
    setup_logging()
    options = parse_arguments(arguments)
    with user_errors(), tempfile.TemporaryDirectory(prefix="glus_demo_") as folder:
        page = build_demo(load(options.weights, allow_cpu=options.allow_cpu), str(options.weights), Path(folder))
        page.launch(server_name=options.host, server_port=options.port, allowed_paths=[folder])


if __name__ == "__main__":
    main()
