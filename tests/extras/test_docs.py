"""The docs pages: links lead somewhere, commands name what there is, each page says its purpose."""

import re
from pathlib import Path

import pytest

from cli import Parser, add_flags
from settings import Method, Settings

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page(page):
    text = page.read_text()
    title, _, purpose = text.partition("\n\n")
    assert title.startswith("# ") and purpose.startswith("This page ")
    for link in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    for name in re.findall(r"python -m extras\.(\w+)", text):
        assert (ROOT / "extras" / f"{name}.py").is_file(), name
    for name in re.findall(r"(?<![\w/-])python ((?!-)[\w/]+\.py)", text):
        if page.stem != "results":  # that page has commands as they were recorded, too
            assert (ROOT / name).is_file(), name


def test_flags_of_run_all_are_there():
    parser = Parser(prog="run_all.py")
    add_flags(parser, Settings)
    add_flags(parser, Method)
    known = {flag for action in parser._actions for flag in action.option_strings}
    count = 0
    for page in PAGES:
        if page.stem == "results":
            continue
        for command in re.findall(r"run_all\.py [^`#\n]*(?:\\\n[^`#\n]*)*", page.read_text()):
            for flag in re.findall(r"(?<=\s)--[a-z-]+", command):
                assert flag in known, f"{page.name}: {flag}"
                count += 1
    assert count >= 10
