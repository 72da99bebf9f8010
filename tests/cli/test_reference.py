"""`docs/reference.md` is what the docstrings of the public names say, and nothing of torch's or pydantic's."""

from __future__ import annotations

from lorax_core.cli.reference import MODULES, page


def test_the_committed_page_is_the_one_that_is_made(repository):
    committed = (repository / "docs/reference.md").read_text(encoding="utf-8")

    assert page() == committed, "the page is old; the command to make it again is in its first lines"


def test_a_name_has_what_its_source_says_of_it():
    made = page()

    assert [f"## {module}\n" in made for module in MODULES] == [True] * len(MODULES)
    assert (
        "### RMSNorm\n\n```python\nclass RMSNorm(Norm):\n    def __init__(size: int, eps: float, offset: float = 0.0)"
        in made
    )
    assert "    api: int\n" in made
    assert "- `head(task: Task) -> str`: Class path of the head that answers `task`" in made
    assert "### hookimpl\n\nMarks a function of `plugin.py`" in made


def test_nothing_is_of_others():
    made = page()

    for theirs in ("register_forward_hook", "model_validate", "requires_grad_", "load_state_dict", "model_construct"):
        assert theirs not in made
