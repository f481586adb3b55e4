"""From text or messages to the token ids that a model is trained on, for rows that do not bring the served ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]


def read_chat_template(setting: str | None) -> str | None:
    """The Jinja text that the setting holds or names the file of. Raises ValueError for a file that is not there."""
    if setting is None or "{" in setting or "\n" in setting:
        return setting
    path = Path(setting)
    if not path.is_file():
        raise ValueError(f"chat_template = {setting!r} is neither Jinja text nor an existing file")
    return path.read_text()


def encode(
    tokenizer: Any, prompt: str | Sequence[Message], completion: str, chat_template: str | None
) -> tuple[list[int], list[int]]:
    """`(prompt_ids, completion_ids)`. Messages go through the chat template; the completion ends with the token that
    the template ends a turn with (Gemma's `<end_of_turn>`), else with eos.

    The prompt's ids are those that an engine would be given. The completion's are what follows them in the ids of both
    together, so that spaces and merges come out as in running text, unless the seam itself would be merged away.
    Raises ValueError where messages meet no template, the template refuses them, or there is nothing to predict from.
    """
    if isinstance(prompt, str):
        text, special, end = prompt, True, tokenizer.eos_token_id
    else:
        text, special = _render(tokenizer, prompt, chat_template), False  # a template writes its own special tokens
        end = _end_of_turn(tokenizer, chat_template)
    prompt_ids = _ids(tokenizer, text, special)
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and special:
        prompt_ids = prompt_ids[:-1]  # some tokenizers close every text; nothing is generated after that
    both = _ids(tokenizer, text + completion, special)
    is_seam_clean = both[: len(prompt_ids)] == prompt_ids
    completion_ids = both[len(prompt_ids) :] if is_seam_clean else _ids(tokenizer, completion, False)
    if not prompt_ids:
        raise ValueError("the prompt has no tokens: expected text, or a tokenizer that begins every text with one")
    if end is None:
        raise ValueError("the tokenizer has no eos token: a completion could not be ended")
    if completion_ids[-1:] != [end]:
        completion_ids.append(end)
    return prompt_ids, completion_ids


@functools.lru_cache(maxsize=4)
def _end_of_turn(tokenizer: Any, chat_template: str | None) -> int | None:
    """The first special token that the template writes behind an assistant's words; eos where it writes none."""
    from jinja2 import TemplateError

    words = "the assistant's words"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": words}]
    try:
        text = str(tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False))
    except TemplateError:
        return tokenizer.eos_token_id  # type: ignore[no-any-return]
    behind = _ids(tokenizer, text.rpartition(words)[2], False) if words in text else []
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return next((index for index in behind if index in special), tokenizer.eos_token_id)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _render(tokenizer: Any, messages: Sequence[Message], chat_template: str | None) -> str:
    from jinja2 import TemplateError

    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the prompt is a list of messages and the model brings no chat template: "
            "set chat_template to Jinja text or to a file of it"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=chat_template, tokenize=False, add_generation_prompt=True
            )
        )
    except TemplateError as exc:
        raise ValueError(f"the chat template refuses the messages: {exc}") from exc
