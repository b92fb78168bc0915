"""Question answering, text and synthetic long-context data as tokenized rows for training and evaluation."""

from data.corpus import Corpus, load
from data.reading import DataError
from data.report import DataReport
from data.settings import DataSettings, SyntheticSettings

__all__ = ["Corpus", "DataError", "DataReport", "DataSettings", "SyntheticSettings", "load"]
