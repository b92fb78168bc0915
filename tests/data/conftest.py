import json
import random

import pytest

WORDS = ("river", "fox", "dog", "anna", "ben", "stone", "green", "tower", "found", "lost", "winter", "bread", "seven")


def passage(rng: random.Random, number: int) -> str:
    return f"Passage p{number}: " + " ".join(rng.choices(WORDS, k=rng.randrange(5, 25))) + "."


@pytest.fixture
def squad(tmp_path):
    """40 passages of 30 to 100 tokens with 3 questions each; passage and answers carry a number of their own."""
    rng = random.Random(0)
    paragraphs = []
    for number in range(40):
        qas = [
            {"question": f"What is q{number}x{i}?", "answers": [{"text": f"a{number}x{i}"}, {"text": f"b{number}x{i}"}]}
            for i in range(3)
        ]
        paragraphs.append({"context": passage(rng, number), "qas": qas})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    return path
