"""The committed base model is what its figures say, and small and plain enough for vLLM on two cores."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from deploy.demo import figures, measure, world
from deploy.demo.measure import MODEL_DIR


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_the_model_is_a_small_llama_that_vllm_takes() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.head_dim in (32, 64)
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert sum(weight.numel() for weight in model.parameters()) <= 3_000_000


def test_figures_belong_to_the_committed_weights_and_are_within_the_bounds_of_the_demo() -> None:
    noted = json.loads((MODEL_DIR / "figures.json").read_text())
    assert noted["weights_sha256"] == figures.weights_hash(MODEL_DIR)
    assert noted["measures"]["fact_accuracy"] >= 0.97
    assert 0.55 <= noted["measures"]["preference_accuracy"] <= 0.80
    assert 0.5 <= noted["measures"]["apology_rate"] <= 0.8


def test_the_model_answers_fresh_questions_with_the_right_fact(tokenizer: PreTrainedTokenizerBase) -> None:
    model, padded = figures.load(MODEL_DIR)
    asked = measure.eval_questions(72)
    replies = figures.generate(model, padded, [figures.as_prompt(question) for question in asked], temperature=0)
    right = [world.has_fact(reply, question.fact) for question, reply in zip(asked, replies, strict=True)]
    assert sum(right) >= 0.95 * len(right)


def test_the_prompt_of_a_later_turn_begins_with_all_that_came_before(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "system", "content": world.SYSTEM}]
    before: list[int] = []
    for turn in range(3):
        talk.append({"role": "user", "content": f"Hello, question number {turn}?"})
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        assert prompt[: len(before)] == before
        reply = "Open Settings > Security."
        before = [*prompt, *tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id]
        talk.append({"role": "assistant", "content": reply})


def test_the_chat_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Größe 42 – naïve?  \n\t日本語 🙂 $4.99"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
