"""Measure models with full and with compressed caches: retrieval, question answering, loss, memory."""

from lrsa.evaluation.comparison import compare
from lrsa.evaluation.measure.cost import LayerCost, cache_cost, prefill_cost
from lrsa.evaluation.measure.generation import generate_answers
from lrsa.evaluation.measure.perplexity import evaluate_loss, perplexity_of, teacher_forced
from lrsa.evaluation.measure.question_answering import evaluate_question_answering
from lrsa.evaluation.measure.retrieval import evaluate_retrieval
from lrsa.evaluation.measure.state import Variant
from lrsa.evaluation.report.pictures import draw_training
from lrsa.evaluation.report.tables import print_report, save_report
from lrsa.evaluation.results import Cell, Results, Setting
from lrsa.evaluation.score import Score, paired_difference

__all__ = [
    "Cell",
    "LayerCost",
    "Results",
    "Score",
    "Setting",
    "Variant",
    "cache_cost",
    "compare",
    "draw_training",
    "evaluate_loss",
    "evaluate_question_answering",
    "evaluate_retrieval",
    "generate_answers",
    "paired_difference",
    "perplexity_of",
    "prefill_cost",
    "print_report",
    "save_report",
    "teacher_forced",
]
