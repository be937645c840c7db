"""``ANSWERS.sha256`` next to a complete answers file, in the format of ``sha256sum``: shows a later change."""

from pathlib import Path

from llm2clip_plugin.contracts import ContractError, atomic_file, sha256_file, sha256_text


def checksum_file(answers: Path) -> Path:
    """Path of the checksum; the file need not exist."""
    return answers.with_name(answers.name + ".sha256")


def write_checksum(answers: Path, text: str) -> None:
    """Write the checksum of the ``text`` that ``answers`` will have."""
    with atomic_file(checksum_file(answers)) as temporary:
        temporary.write_text(f"{sha256_text(text)}  {answers.name}\n", encoding="utf-8")


def check_unchanged(answers: Path) -> None:
    """Compare answers with their checksum, if both exist; raises ContractError with both hashes."""
    path = checksum_file(answers)
    if not path.is_file() or not answers.is_file():
        return
    expected, actual = path.read_text(encoding="utf-8", errors="replace").split(" ")[0].strip(), sha256_file(answers)
    if actual != expected:
        raise ContractError(
            f"{answers} was changed after it was written: its SHA-256 is {actual[:12]}..., {path.name} says "
            f"{expected[:12]!r}...; answer the questions again (--overwrite), or, if the change is intended, delete "
            f"{path}"
        )
