"""Where real CLEVR pictures are: the folder that CLEVR names, or one beside the repository; tests skip without."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("CLEVR") or Path(__file__).resolve().parents[2] / "shared" / "clevr_blender")
needs_clevr = pytest.mark.skipif(not (ROOT / "scenes").is_dir(), reason="no folder of real CLEVR pictures (set CLEVR)")
