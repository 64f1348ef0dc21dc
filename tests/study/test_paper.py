"The paper's sentences and claims: complete, and quoted as they stand."

import re
from pathlib import Path

import pytest

from agrivision_repro.study.paper import CLAIMS, NO_CLAIM, sentence_table

PAPER = Path(__file__).resolve().parents[3] / "shared" / "paper.md"
SECTIONS = ["abstract", "§1", "§2", "§2.1", "§2.2", "§2.3", "§2.4", "§3", "§3.1", "§3.2", "§4", "§5", "§6", "§7"]


def plain(text: str) -> str:
    "Drop formulas, references to the bibliography and emphasis."
    text = re.sub(r"<sup>.*?</sup>|\$[^$]*\$|\[[\d, ]+\]|\*", "", text.replace("’", "'"))
    return re.sub(r" +([,.])", r" \1", re.sub(r"\s+", " ", text)).strip()


def paper_paragraphs() -> list[str]:
    "Read the prose and captions; a paragraph that a figure or page interrupts is one."
    text = PAPER.read_text()
    text = text[text.index("## Abstract") : text.index("## References")]
    paragraphs: list[str] = []
    for raw in re.split(r"\n\s*\n", text):
        raw = raw.strip("\x00 \n-\u2002")
        if not raw or raw.startswith(("#", "$$", "\\*Equal", "between data modalities")) or "\t" in raw:
            continue
        is_rest = raw[0].islower() and paragraphs
        owner = next(k for k in reversed(range(len(paragraphs))) if not re.match(r"(Figure|Table) \d:", paragraphs[k])) if is_rest else 0
        if is_rest:
            paragraphs[owner] = paragraphs[owner].removesuffix("-") + ("" if paragraphs[owner].endswith("-") else " ") + raw
        else:
            paragraphs.append(raw)
    return [re.sub(r"^(Figure|Table) \d: ", "", plain(p)) for p in paragraphs]


def paper_sentences() -> list[str]:
    "Split the paragraphs at full stops before a capital letter, or before an omitted formula."
    stop = r"(?<!Fig)(?<!Perf)(?<!et al)(?<!i\.e)[.] (?=[A-Z]|and controls|achieves)"
    return [sentence for paragraph in paper_paragraphs() for sentence in re.split(stop, paragraph) if sentence]


needs_paper = pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not beside this checkout")


def test_every_claim_has_a_sentence_and_every_section_stands():
    table = sentence_table()
    assert list(dict.fromkeys(w for w in table["where"] if not w.startswith(("Figure", "Table")))) == SECTIONS
    assert {key for keys in table.claims for key in keys.split()} == {claim.key for claim in CLAIMS}
    assert ((table.claims == "") == table.otherwise.isin(NO_CLAIM)).all() and not table.begins.duplicated().any()


def test_claims_stand_where_their_sentences_stand():
    "A claim's place is that of a sentence that makes it."
    table = sentence_table()
    for claim in CLAIMS:
        places = {where for where, keys in zip(table["where"], table.claims, strict=True) if claim.key in keys.split()}
        assert places & set(claim.where.split(", ")), (claim.key, places)


@needs_paper
def test_no_sentence_of_the_paper_is_missing():
    begins = sentence_table().begins.tolist()
    text = paper_sentences()
    unlisted = [s for s in text if sum(s.startswith(plain(b)) for b in begins) != 1]
    unfound = [b for b in begins if sum(s.startswith(plain(b)) for s in text) != 1]
    assert (unlisted, unfound) == ([], [])


@needs_paper
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.key)
def test_claims_are_quoted(claim):
    "Each piece between brackets stands in the paper, in this order."
    pieces = [plain(piece) for piece in re.split(r"\[[^\]]*\]", claim.sentence)]
    pattern = ".*?".join(re.escape(piece.strip()) for piece in pieces)
    assert re.search(pattern, " ".join(paper_paragraphs()), re.IGNORECASE)
