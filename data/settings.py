"""What a run may say about its data: the `data` section of a YAML file, checked by pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

DEFAULT_TEMPLATE = (
    "Read the passages and answer the question with a few words from them.\n\n"
    "{context}\n\n"
    "Question: {question}\nAnswer:"
)
Paths = Annotated[list[str], Field(min_length=1)]
COLUMNS = {
    "qa": ("question", "context", "answers"),
    "text": ("text",),
    "chat": (
        *("messages", "role", "content", "prompt", "completion"),
        *("instruction", "input", "output", "system", "tools"),
    ),
}
KINDS = Literal["qa", "chat", "text", "synthetic"]


class SyntheticSettings(BaseModel):
    """The `data.synthetic` section: which retrieval task is generated, and how hard it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: Literal["key_value", "passkey"] = Field(
        "key_value",
        description="key_value: several facts (a name and its code), a question about one; passkey: one fact.",
    )
    keys: int = Field(4, ge=1, description="Facts per key_value row, at random depths.")
    digits: int = Field(3, ge=1, description="Digits of each answer; a digit is one token.")
    questions: int = Field(
        1,
        ge=1,
        description="Questions per key_value training row, each about another fact; evaluation rows have one.",
    )
    rows: int = Field(4000, ge=1, description="Number of training rows; evaluation rows come on top.")


class SourceSettings(BaseModel):
    """One source of rows: where they come from, what is made of them, and what is held out for evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: KINDS = Field(
        description="qa: question answering over long contexts; chat: conversations, instructions or prompts with "
        "completions; text: plain language modelling; synthetic: generated rows that ask for codes hidden among filler "
        "words."
    )
    path: str | Paths | None = Field(
        None,
        validate_default=True,
        description="A local .json, .jsonl, .csv, .tsv, .txt, .md, .parquet or .arrow file (all but the last two also "
        "packed as .gz, .bz2 or .zst), a pattern such as shards/*.jsonl, a local directory of files of one of these "
        "kinds, the name of a data set on the Hugging Face Hub, or a list of these. Not used by synthetic.",
    )
    name: str | None = Field(None, description="Configuration (subset) of a data set, for example distractor.")
    split: str = Field("train", description="Split of a data set or folder to train on.")
    eval_path: str | Paths | None = Field(
        None, description="As path, to evaluate on, in place of rows held out of the training data."
    )
    eval_split: str | None = Field(None, description="Split of eval_path (or of path) to evaluate on.")
    eval_rows: int = Field(
        200,
        ge=0,
        description="Maximum number of evaluation rows; 0 for none. Without eval_path and eval_split they are held out "
        "of the training data, whole passages or documents at a time.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names of the columns in your data, where they differ from ours: {question: ..., context: ..., "
        "answers: ...} for qa, {text: ...} for text, and for chat {messages: ...} with role and content in each "
        "message, {prompt: ..., completion: ...} (texts that no chat template goes around, or lists of messages) or "
        "{instruction: ..., input: ..., output: ...}, with system and tools where there are any.",
    )
    format: Literal["auto", "squad", "hotpotqa", "generic"] = Field(
        "auto",
        description="Layout of qa records; generic: columns question, context (a text or a list) and answers; auto "
        "decides by the first record.",
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="Maximum number of training rows, drawn at random (the first ones when streaming); default all.",
    )
    prompt_template: str = Field(
        DEFAULT_TEMPLATE,
        description="Prompt of qa rows, with {context} and {question} once each. The blank line after {context} also "
        "stands between passages. A chat template, where the tokenizer has one, goes around it.",
    )
    distractors: Literal["auto", "none", "pool"] = Field(
        "auto",
        description="qa: pool fills rows up to context_length with passages of other records, among which the "
        "right one has to be found; none leaves a row with its own context; auto is pool for squad and hotpotqa, "
        "whose passages are short, and none for other records.",
    )
    shuffle_passages: bool | None = Field(
        None,
        description="qa: put the passages of a row in random order. null: yes, unless a context is a list of texts "
        "without titles, such as pages, which then stay together in their order.",
    )
    questions_per_row: int = Field(
        1,
        ge=1,
        description="qa: maximum number of questions that a row to train on asks, one after the other, about its "
        "passages. More teach more in the time of a row; rows to evaluate on ask one.",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="chat: train on every answer of the assistant, or on the last one of each chat."
    )
    too_long: Literal["drop", "cut"] = Field(
        "drop",
        description="chat: drop chats longer than context_length, or cut their oldest turns (not the system message) "
        "until they fit; answers are never cut.",
    )
    end_of_document: bool = Field(
        True,
        description="text: train the end-of-text token after every document, so that the model does not unlearn it.",
    )
    join_documents: bool = Field(
        False,
        description="text: false splits each document on its own, so no row mixes documents; true joins short "
        "documents to rows of context_length, in which a token may attend to the document before its own.",
    )
    synthetic: SyntheticSettings = Field(default_factory=SyntheticSettings, description="Settings of kind synthetic.")

    @field_validator("path")
    @classmethod
    def _path_fits_kind(cls, path: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        kind = info.data.get("kind")
        if kind == "synthetic" and path is not None:
            raise ValueError(
                f"kind synthetic generates its rows and reads no path, got {path!r}: remove path or change kind"
            )
        if kind in ("qa", "chat", "text") and not path:
            raise ValueError(f"kind {kind} needs path: a local file, or the name of a data set on the Hugging Face Hub")
        return path

    @property
    def origin(self) -> str:
        """Where the rows come from."""
        if self.path is None:
            return f"synthetic {self.synthetic.task}"
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    @property
    def source(self) -> str:
        """What messages call the records to train on."""
        return f"data.path {self.origin}"

    @property
    def evaluation_source(self) -> str:
        """What messages call the records to evaluate on."""
        return f"data.eval_path {self.eval_path}" if self.eval_path else self.source

    @field_validator("columns")
    @classmethod
    def _columns_are_known(cls, columns: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        kind = info.data.get("kind")
        known = COLUMNS.get(kind, ())
        unknown = [name for name in columns if name not in known]
        if unknown and known:
            raise ValueError(
                f"unknown column {', '.join(unknown)}: the left side is our name, of kind {kind} one of "
                f"{', '.join(known)}, the right side the file's"
            )
        return columns

    @field_validator("prompt_template", mode="before")
    @classmethod
    def _null_is_the_default(cls, template: object) -> object:
        return DEFAULT_TEMPLATE if template is None else template

    @field_validator("prompt_template")
    @classmethod
    def _template_can_be_filled(cls, template: str) -> str:
        for slot in ("{context}", "{question}"):
            if template.count(slot) != 1:
                raise ValueError(f"must hold {slot} exactly once, found {template.count(slot)} times in {template!r}")
        if template != template.strip():
            raise ValueError("must not begin or end with blanks or newlines: the answer follows after one blank")
        after_context = template.split("{context}")[1]
        if not after_context or not after_context[0].isspace():
            raise ValueError(
                "needs a blank line after {context} (it also stands between passages), "
                f"got {after_context[:20]!r}: put the question after it, or a line such as 'Answer:'"
            )
        return template


class ListedSource(SourceSettings):
    """An entry of `data.sources`."""

    weight: float | None = Field(
        None,
        gt=0,
        description="Share of the training rows that come from this source, in relation to the other weights. Without "
        "weights every row of every source is used once.",
    )


class DataSettings(SourceSettings):
    """The `data` section: one source, or several in `sources`."""

    kind: KINDS | None = Field(None, description=f"{SourceSettings.model_fields['kind'].description} Not with sources.")
    context_length: int = Field(
        4096, ge=8, description="Maximum tokens per row: prompt, answer and end-of-text token together."
    )
    sources: Annotated[list[ListedSource], Field(min_length=1)] | None = Field(
        None,
        description="Several sources, each with the settings of this section but context_length, streaming and "
        "stopping_strategy, and with a weight; kinds may differ. Each has held-out rows and a report of its own.",
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="With weights: stop when the first source has no row left, so that none is used twice, or when the "
        "last one has none, the others starting again (as of datasets.interleave_datasets).",
    )
    streaming: bool = Field(
        False,
        description="Read records and make rows as training needs them, in the order of the files, for data that does "
        "not fit into memory. Needs train.max_steps. Rows are held out of the first thousand records, among which "
        "distractors of qa are drawn, too; later thousands have their own.",
    )

    @model_validator(mode="after")
    def _one_source_or_several(self) -> DataSettings:
        if self.sources is None:
            if self.kind is None:
                raise ValueError("kind must be set (one of qa, chat, text, synthetic), or sources with a kind each")
            if self.stopping_strategy != "first_exhausted":
                raise ValueError("stopping_strategy has no effect without sources with weights: leave it out")
            return self
        defaults = SourceSettings.model_fields.items()
        moved = [
            name
            for name, field in defaults
            if name != "kind" and getattr(self, name) != field.get_default(call_default_factory=True)
        ]
        moved += ["kind"] if self.kind else []
        if moved:
            raise ValueError(f"with sources, {', '.join(sorted(moved))} must be set in each of them")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"sources: weight must be set for all of them or for none, missing in {weighted.index(False)}"
            )
        if self.stopping_strategy != "first_exhausted" and not any(weighted):
            raise ValueError("stopping_strategy has no effect without weights: set weight in each of sources")
        if self.streaming and len(weighted) > 1 and not all(weighted):
            raise ValueError("streaming several sources needs a weight for each: they may have no end")
        return self

    def each(self) -> dict[str, DataSettings]:
        """The settings of every source by a short name, such as `questions.json`; one without `sources`."""
        found: dict[str, DataSettings] = {}
        for source in self.sources or [self]:
            values = {name: getattr(source, name) for name in SourceSettings.model_fields}
            one = DataSettings(**values, context_length=self.context_length, streaming=self.streaming)
            first, *more = [one.path] if isinstance(one.path, str) else one.path or [one.origin]
            name = Path(first).name + (f" and {len(more)} more" if more else "")
            count = sum(other.partition(" #")[0] == name for other in found)
            found[f"{name} #{count + 1}" if count else name] = one
        return found
