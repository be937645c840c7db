"""The Dockerfile makes the environments of scripts/environments.sh, those that scripts/test.sh
really installs."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MADE = {  # target -> the environments that it makes, as scripts/environments.sh names them
    "llava": "llava_environment .venv-llava",
    "test": "train_environment .venv train,dev; llava_environment .venv-llava",
    "train": "train_environment .venv train",  # the last: what `docker build .` makes
}


def test_targets_make_their_environments_and_the_tests_image_runs_what_ci_runs() -> (
    None
):
    stages = re.findall(
        r"^FROM (\S+) AS (\S+)$(.*?)(?=^FROM|\Z)",
        (ROOT / "Dockerfile").read_text(),
        re.M | re.S,
    )
    steps = {name: text for _, name, text in stages}
    assert "apt-get install" in steps["base"]
    assert "g++" in steps["base"]
    assert [(image, name) for image, name, _ in stages[1:]] == [
        ("base", target) for target in MADE
    ]
    for target, made in MADE.items():
        assert f"RUN ROOT=$PWD; . scripts/environments.sh; {made}\n" in steps[target]
    assert 'CMD ["scripts/test.sh"]' in steps["test"]
    assert "exec scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_an_environment_whose_installation_failed_is_made_again(tmp_path: Path) -> None:
    made = (
        "need_compiler() { :; }; find_python() { echo venv; }; venv() { mkdir $3; }; "
    )
    made += "install() { [[ $* != *speed* ]]; }"
    script = f"ROOT=$PWD; . scripts/environments.sh; {made}; pinned_environment $0 || echo failed"
    done = subprocess.run(
        ["bash", "-c", script, tmp_path / "env"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout == b"failed\n"
    assert [*tmp_path.iterdir()] == [tmp_path / "env"]
    assert not (tmp_path / "env" / "made-for").exists()
