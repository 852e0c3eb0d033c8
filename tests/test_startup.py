"""Programs that compute nothing with torch do not load it: seconds of a start, and workflows have many stages."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Those that run a network, of the stages and of the experiment, or write its weights.
NEED_TORCH = {"evaluate", "extract_features", "filter_ood", "segment", "train_segmenter", "experiment.rival_samples"}
NEED_TORCH |= {"publish_model"}
CODE = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        importlib.import_module(f"scripts.{name}").main(["--help"])
    assert "usage:" in said.getvalue(), name
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""


def test_programs_that_need_no_torch_start_without():
    folders = [ROOT / "scripts", ROOT / "scripts/workflow", ROOT / "scripts/experiment"]
    paths = [path for folder in folders for path in sorted(folder.glob("*.py")) if "cli.run(" in path.read_text()]
    names = {".".join(path.relative_to(ROOT / "scripts").with_suffix("").parts) for path in paths}
    assert names > NEED_TORCH and len(names) > 15
    command = [sys.executable, "-c", CODE, *sorted(names - NEED_TORCH)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
