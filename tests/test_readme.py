"""What the README shows must work."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "vit_base_patch16_224" in done.stdout and "torch.Size([8, 10])" in done.stdout
    assert "[(2, 96, 64, 80), (2, 192, 32, 40), (2, 384, 16, 20), (2, 768, 8, 10)]" in done.stdout


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_map_of_lessons_names_every_lesson():
    from vitcourse.course.checks import TOPICS

    rows = re.findall(r"^\| (\d\d) \|", README, re.MULTILINE)
    assert rows == [f"{n:02d}" for n in range(len(TOPICS))]
    ready = re.findall(r"^\| (\d\d) \|.*\| ready \|$", README, re.MULTILINE)
    assert ready == sorted(file.name[:2] for file in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert targets == {"lab", "test", "oldest", "bench", "gpu"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
