#!/usr/bin/env python3
"""The README's file tree: every tracked file with the first line that says its purpose.

usage: file_tree.py [--check]     writes the tree into README.md; --check only says whether it is true (exit 1 if not)
"""
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BEGIN, END = "## Files\n\n```text\n", "```\n"
WIDTH = 140
# What a reader does not look for: data of tests, and what every repository has.
LEFT_OUT = re.compile(r"^(tests/fixtures/|tests/cuda/.*/fixtures/|Cargo|LICENSE|README|\.gitignore|rustfmt|docs/.*\.(png|svg)$|.*snapshots/)")


def purpose(path):
    with open(os.path.join(HERE, path), encoding="utf-8", errors="replace") as file:
        lines = file.read(4000).splitlines()
    text = []
    for line in lines:
        stripped = line.strip()
        if not text and (stripped.startswith("#!") or not stripped or stripped in ("/*", "<!doctype html>")):
            continue
        match = re.match(r'^(//!|//|#|/\*\*?|<!--|"""|\*)\s?(.*)$', stripped)
        if not match and not text:
            return ""
        if match:
            words = match.group(2)
        elif lines and any(line.startswith('"""') for line in lines[:2]):
            words = stripped
        else:
            break
        words = re.sub(r'\s*(\*/|-->|""")\s*$', "", words).strip("# ")
        if not words:
            break
        text.append(words)
        if words.endswith(".") or path.endswith(".md"):
            break
    sentence = re.split(r"(?<=[a-z0-9)`'])[.](?:\s|$)", " ".join(text))[0]
    return sentence.rstrip(".:")


def tree():
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True, check=True).stdout.split("\n")
    folders = {}
    for path in filter(None, listed):
        if not LEFT_OUT.match(path) and os.path.exists(os.path.join(HERE, path)):
            folders.setdefault(os.path.dirname(path), []).append(path)
    lines = []
    for folder in sorted(folders):
        lines.append(f"{folder or '.'}/" if folder else ".")
        for path in sorted(folders[folder]):
            line = f"  {os.path.basename(path):<22} {purpose(path)}".rstrip()
            lines.append(line if len(line) <= WIDTH else line[:WIDTH].rsplit(" ", 1)[0] + " ...")
    return "\n".join(lines) + "\n"


if not os.path.exists(os.path.join(HERE, ".git")):
    sys.exit(print("no git repository here: the file tree is not checked"))
readme = os.path.join(HERE, "README.md")
with open(readme, encoding="utf-8") as file:
    text = file.read()
before, rest = text.split(BEGIN, 1)
_, after = rest.split(END, 1)
made = before + BEGIN + tree() + END + after
if "--check" in sys.argv:
    if made != text:
        sys.exit("README.md's file tree is out of date: run scripts/file_tree.py and commit")
elif made != text:
    with open(readme, "w", encoding="utf-8") as file:
        file.write(made)
