"""Rows of lm-evaluation-harness' long-context tasks, scored by the tasks themselves: RULER, which is generated, and
LongBench, which is fetched from the Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from lrsa.evaluation.extra import extra
from lrsa.evaluation.score import Score
from lrsa.prompt import PromptFormat

# Those whose text is generated; the others of RULER fetch essays or questions.
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
LONGBENCH = tuple(  # the English tasks
    f"longbench_{name}"
    for name in (
        *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum"),
        *("multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
    )
)


def harness_rows(
    name: str, tokenizer, turn: PromptFormat, length: int, count: int
) -> tuple[list[dict], Callable[[Sequence[str], Sequence[dict], int], dict[str, Score]], int]:
    """The first rows of a task, a function that scores answers to them, and how many tokens an answer may have.

    Args:
        tokenizer: with the name that it was loaded from, by which RULER loads it again.
        turn: what stands around the prompts.
        length: tokens of a row; a longer prompt loses its middle, as LongBench does it.

    Raises:
        ImportError: when lm-evaluation-harness, or what the task generates with, is not installed.
        OSError, ValueError: when the data cannot be fetched.
    """
    tasks = extra("lm_eval.tasks", "harness")
    manager = tasks.TaskManager(metadata={"tokenizer": tokenizer.name_or_path, "max_seq_lengths": [length]})
    task = tasks.get_task_dict([name], manager)[name]
    most = task.config.generation_kwargs["max_gen_toks"]
    rows = []
    for doc in islice(task.eval_docs, count):
        text = turn.prompt(task.doc_to_text(doc)) + (task.doc_to_prefix(doc) or "")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = length - most
        if len(ids) > room:
            ids = ids[: room // 2] + ids[room // 2 - room :]
        answers = task.doc_to_target(doc)
        answers = [answers] if isinstance(answers, str) else [", ".join(map(str, answers))]
        end = tokenizer(turn.lead + answers[0] + turn.after, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": ids + end, "prompt_length": len(ids), "answers": answers, "depth": None, "doc": doc})

    def score(generated: Sequence[str], rows: Sequence[dict], seed: int = 0) -> dict[str, Score]:
        found = [task.process_results(row["doc"], [text]) for text, row in zip(generated, rows, strict=True)]
        key = str(length) if str(length) in found[0] else "score"
        return {"accuracy": Score.from_rows([values[key] for values in found], f"{name}'s own score", seed)}

    return rows, score, most
