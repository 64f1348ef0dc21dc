"Write llms.txt, the index of the site for language models, and llms-full.txt, all notebooks in one text (llmstxt.org)."

import json
from pathlib import Path

from found import read_lead


def write_index(
    home: Path,  # the notebook whose title and quote stand first
    sections: dict[str, list[tuple[str, str, str]]],  # heading → title, address relative to the site, one sentence
) -> str:  # Markdown
    "Write llms.txt: title, quote, and sections of links."
    title, quote = read_lead(home)
    lines = [f"# {title}", "", f"> {quote}"]
    for heading, links in sections.items():
        lines += ["", f"## {heading}", "", *(f"- [{name}]({address}): {sentence}" for name, address, sentence in links)]
    return "\n".join(lines) + "\n"


def write_text(path: Path) -> str:  # Markdown
    "Return the markdown and the code of a notebook, without outputs."
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        fence = "````" if "```" in source else "```"
        parts.append(source if cell["cell_type"] == "markdown" else f"{fence}python\n{source}\n{fence}")
    return "\n\n".join(part for part in parts if part)
