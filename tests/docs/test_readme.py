"""The Python code of README.md and docs/*.md runs, file by file, from top to bottom.

A block whose first line before it is `<!-- not run: reason -->` is skipped, with that reason. The others of one file
share their names, as a reader would type them into one session, in an empty folder and with the hub out of reach.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:^<!--[ ]*not[ ]run:(?P<reason>[^\n]*?)-->[ ]*\n\s*)?"
    r"^(?P<indent>[ ]*)(?P<fence>`{3,})python[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    line: int  # of the first line of code, from 1
    code: str
    reason: str | None  # why it is not run


def python_blocks(text: str) -> list[Block]:
    blocks = []
    for match in BLOCK.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        reason = match["reason"] and match["reason"].strip()
        blocks.append(Block(text.count("\n", 0, match.start("code")) + 1, code, reason))
    return blocks


def run_blocks(blocks: list[Block], name: str) -> dict:
    """Runs the blocks with shared names; a traceback shows the file's own lines."""
    names: dict = {"__name__": "__main__"}
    for block in blocks:
        if block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), names)
    return names


def documents() -> list[Path]:
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if path.exists()]


def test_the_readme_shows_python_code_and_runs_some_of_it():
    blocks = python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks
    assert any(block.reason is None for block in blocks)


def each_document() -> list:
    """As parameters; those whose code takes long are marked."""
    names = [str(path.relative_to(ROOT)) for path in documents()]
    slow = ("docs/distributed.md", "docs/training.md")
    return [pytest.param(ROOT / name, marks=pytest.mark.slow if name in slow else (), id=name) for name in names]


@pytest.mark.parametrize("path", each_document())
def test_the_code_of_a_document_runs(path, tmp_path, monkeypatch):
    blocks = python_blocks(path.read_text(encoding="utf-8"))
    if all(block.reason for block in blocks):
        pytest.skip("; ".join(block.reason for block in blocks) or "no Python code")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run_blocks(blocks, str(path))


# -- that the blocks are found ----------------------------------------------------------------------------------------

DOCUMENT = """\
# Title

```python
x = 2
```

<!-- not run: downloads 13 GB -->
```python
raise SystemExit
```

1. A list:

   ```python
   if x:
       y = x + 3
   ```

```bash
rm -rf /
```

<!-- not run: this comment belongs to nothing -->

Text.

````python
z = '''
```
'''
````
"""


def test_blocks_are_found_with_their_lines_indents_and_reasons():
    blocks = python_blocks(DOCUMENT)
    assert [(block.line, block.reason) for block in blocks] == [
        (4, None),
        (9, "downloads 13 GB"),
        (15, None),
        (28, None),
    ]
    names = run_blocks(blocks, "document")
    assert (names["x"], names["y"], names["z"]) == (2, 5, "\n```\n")


def test_a_reason_cannot_be_empty_and_code_that_fails_fails_on_its_line():
    blocks = python_blocks("<!-- not run: -->\n```python\n1 / 0\n```\n")
    assert blocks[0].reason == ""
    with pytest.raises(AssertionError, match="reason"):
        check_reasons(blocks)
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks(python_blocks("\n\n```python\n\n1 / 0\n```\n"), "document")
    assert caught.traceback[-1].lineno + 1 == 5


def check_reasons(blocks: list[Block]) -> None:
    assert all(block.reason != "" for block in blocks), "a block that is not run needs a reason"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_block_that_is_not_run_says_why(path):
    check_reasons(python_blocks(path.read_text(encoding="utf-8")))
