"""A dense model in experts: the split answers as the dense one does where it must, and learns from it where it may."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moe_lens import MoELens, MoELensError, load_examples
from moe_lens.commands import console
from moe_lens.data import collate, encode
from moe_lens.lens.loading import load_tokenizer
from moe_lens.organism import split as split_command
from moe_lens.organism.distillation import Distilled, distil, text_loss
from moe_lens.organism.moefication import Parts, even_groups, layer_errors, mlp_inputs, split, usage_entropy
from moe_lens.organism.splitting import load_dense
from moe_lens.results import read_table
from moe_lens.tuning import Schedule

SIZES = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None}
PARTS = Parts(experts=8, top_k=4, shared=4)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("organism")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode(example, tokenizer, with_answer=True) for example in load_examples("novel", limit=12)]


@pytest.fixture
def command(monkeypatch):
    def run(main, *line, code=0):
        monkeypatch.setattr(sys, "argv", ["split", *map(str, line)])
        with pytest.raises(SystemExit) as ended:
            console.run(main)
        assert (ended.value.code or 0) == code

    return run


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def dense_model(tokenizer, config=LlamaConfig, model=LlamaForCausalLM, **more):
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    made = model(config(vocab_size=len(tokenizer), initializer_range=0.2, **SIZES, **ends, **more))
    return made.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("config", "model"), [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_with_every_expert_at_weight_1_the_split_is_the_dense_model(tokenizer, prompts, config, model, tied):
    dense = dense_model(tokenizer, config, model, tie_word_embeddings=tied)
    whole = split(dense, prompts[:3], replace(PARTS, top_k=PARTS.experts))
    for layer in whole.model.layers:
        layer.mlp.gate.weight.data.zero_()
    ids = torch.tensor([prompts[3].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_every_neuron_is_in_one_part_and_weights_are_1_on_average(tokenizer, prompts):
    dense = dense_model(tokenizer)
    made = split(dense, prompts[:3], PARTS)
    for own, layer in zip(made.model.layers, dense.model.layers, strict=True):
        rows = torch.cat([own.mlp.experts.gate_up_proj[:, :8].flatten(0, 1), own.mlp.shared_experts.gate_proj.weight])
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, layer.mlp.gate_proj.weight.tolist()))
        weights = own.mlp.gate(torch.randn(5, 32))[1]
        torch.testing.assert_close(weights.sum(-1), torch.full((5,), 4.0))


def test_the_router_prefers_experts_that_write_most(tokenizer, prompts):
    dense = dense_model(tokenizer)
    made = split(dense, prompts, PARTS)
    inputs = mlp_inputs(dense, prompts)
    fitted = layer_errors(dense, made, inputs)
    for layer in made.model.layers:
        layer.mlp.gate.weight.data.neg_()
    assert all(fitted[layer] < 0.8 * error for layer, error in layer_errors(dense, made, inputs).items())


def test_groups_are_even_and_hold_what_acts_together():
    draw = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 6)[draw.permutation(24)]
    features = np.eye(4)[kinds] @ draw.random((4, 200)) + 0.01 * draw.random((24, 200))
    groups = even_groups(features, 4, seed=0)
    assert groups.shape == (4, 6)
    assert all(len(set(kinds[group])) == 1 for group in groups)
    assert sorted(groups.flatten()) == list(range(24))


def test_usage_entropy_is_1_where_all_are_chosen_alike(tokenizer, prompts):
    made = split(dense_model(tokenizer), prompts[:2], replace(PARTS, top_k=PARTS.experts))
    assert usage_entropy(made, prompts[:2]) == pytest.approx({0: 1.0, 1: 1.0})
    made = split(dense_model(tokenizer), prompts[:2], PARTS)
    for layer in made.model.layers:  # the first four always
        layer.mlp.gate.e_score_correction_bias[:4] = 10
    assert usage_entropy(made, prompts[:2]) == pytest.approx({0: np.log(4) / np.log(8), 1: np.log(4) / np.log(8)})


def test_what_is_not_built_as_llama_is_refused(tokenizer, prompts):
    gemma = dense_model(tokenizer, Gemma2Config, Gemma2ForCausalLM)
    with pytest.raises(MoELensError, match="not built as Llama is"):
        split(gemma, prompts[:1], PARTS)
    with pytest.raises(MoELensError, match="96 neurons cannot be shared out evenly"):
        split(dense_model(tokenizer), prompts[:1], Parts(experts=7, top_k=2, shared=3))
    with pytest.raises(MoELensError, match="two or more routed experts"):
        Parts(experts=4, top_k=5, shared=1)
    experts = split(dense_model(tokenizer), prompts[:1], PARTS)
    for other in (experts, torch.nn.Linear(2, 2)):
        with pytest.raises(MoELensError, match="not built as Llama is: expected layers with gate_proj"):
            mlp_inputs(other, prompts[:1])


def test_a_gguf_file_that_is_none_is_told(tmp_path):
    for content in (b"", b"GGUF", b"GGUF\x03\x00garbage" * 9):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(MoELensError, match=r"cannot load .*bad\.gguf"):
            load_dense(str(tmp_path / "bad.gguf"))


def test_a_model_whose_weights_give_no_numbers_has_no_loss(tokenizer, prompts):
    dense = dense_model(tokenizer)
    dense.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(MoELensError, match="the texts' loss is nan"):
        text_loss(dense, prompts[:1])


def test_distillation_is_the_divergence_from_the_teacher_over_all_tokens(tokenizer, prompts):
    teacher, student = dense_model(tokenizer), split(dense_model(tokenizer), prompts[:2], PARTS)
    objective, two = Distilled(teacher), prompts[:2]
    batch = collate(two, tokenizer.pad_token_id)
    by_hand = 0.0
    with torch.no_grad():
        for prompt in two:
            ids = torch.tensor([prompt.input_ids])
            p, q = (model(ids).logits[0, :-1].double().softmax(-1) for model in (teacher, student))
            by_hand += (p * (p / q).log()).sum().item()
        assert objective.loss(student, batch, [0, 1]).item() == pytest.approx(by_hand, rel=1e-4)
        assert objective.loss(teacher, batch, [0, 1]).item() == pytest.approx(0, abs=1e-4)
    assert objective.parts(prompts, [0, 1]) == sum(len(prompt.input_ids) - 1 for prompt in two)


def test_a_student_comes_nearer_and_a_killed_run_goes_on(tokenizer, prompts, tmp_path):
    teacher = dense_model(tokenizer)
    schedule = Schedule(learning_rate=3e-3, epochs=6, batch_size=4, warmup=0)
    made = {"pad_id": tokenizer.pad_token_id, "run": {}}
    student = split(teacher, prompts[:2], PARTS)
    before = sum(layer_errors(teacher, student, mlp_inputs(teacher, prompts)).values())
    distil(student, teacher, prompts, schedule, out=tmp_path / "whole", **made)
    assert sum(layer_errors(teacher, student, mlp_inputs(teacher, prompts)).values()) < before
    again = split(teacher, prompts[:2], PARTS)
    assert distil(again, teacher, prompts, schedule, out=tmp_path / "whole", **made).finished
    assert all(map(torch.equal, again.state_dict().values(), student.state_dict().values()))


@pytest.mark.slow
def test_the_command_makes_a_model_that_a_lens_opens(tokenizer, command, tmp_path, monkeypatch):
    dense_model(tokenizer).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    line = ["--model", tmp_path / "dense", "--data", "swap,novel", "--texts", 24, "--held-out", 4, "--fit-texts", 8]
    line += ["--experts", 8, "--top-k", 4, "--shared", 4, "--router-epochs", 1, "--out", tmp_path / "english"]
    command(split_command.main, *line)
    table = read_table(tmp_path / "english" / "split.parquet").set_index("stage")
    assert list(table.index) == ["dense", "split", "routers", "layers"]
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path))
    lens = MoELens.from_pretrained("english")
    assert (lens.architecture.n_experts, lens.architecture.top_k) == (8, 4)
    held = [
        encode(example, tokenizer, with_answer=True)
        for name in ("swap", "novel")
        for example in load_examples(name, split="train", limit=14)[12:]
    ]
    assert text_loss(lens.module, held) > 0
    judged = {file: file.stat().st_mtime_ns for file in (tmp_path / "english" / "judged").iterdir()}
    command(split_command.main, *line)
    assert {file: file.stat().st_mtime_ns for file in judged} == judged
    for seed in (0, 1):
        command(
            split_command.main,
            *line[:-1],
            tmp_path / f"seed-{seed}",
            "--router-epochs",
            0,
            "--epochs",
            0,
            "--seed",
            seed,
        )
    first, second = (load_dense(str(tmp_path / f"seed-{seed}" / "model"))[0].state_dict() for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first), "the seed is that of the groups, too"
    command(split_command.main, *line[:-1], tmp_path / "twice", "--data", "swap,swap", code=2)  # each data set once
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "analyses")
    line = ["--split", tmp_path / "english", "--dense", tmp_path / "dense", "--data", "swap", "--limit", 6]
    line += ["--batch-size", 4, "--max-new-tokens", 3, "--out", tmp_path / "answers"]
    command(importlib.import_module("english").main, *line)
    answers = read_table(tmp_path / "answers" / "split.parquet")
    examples = load_examples("swap", limit=6)
    assert list(answers["id"]) == [example.id for example in examples]
    assert list(answers["prediction"]) == [text.strip() for text in lens.generate(examples, max_new_tokens=3)]


@pytest.fixture
def folder(tokenizer, tmp_path):
    dense_model(tokenizer).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path


def test_nothing_of_the_users_is_written_over_and_wrong_sizes_claim_no_folder(folder, command, capsys):
    few = ["--texts", 4, "--held-out", 2, "--fit-texts", 2, "--epochs", 0]
    few += ["--experts", 8, "--top-k", 4, "--shared", 4, "--model", folder / "dense", "--data", "swap"]
    mine = folder / "mine" / "model" / "config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for line, says in (
        ([*few, "--out", folder], "lies in --out"),
        ([*few, "--out", folder / "mine"], "holds model/config.json"),
        ([*few, "--experts", 7, "--out", folder / "run"], "cannot be shared out evenly"),
        ([*few, "--experts", 20, "--out", folder / "run"], "multiple of 8"),
    ):
        command(split_command.main, *line, code=2)
        assert says in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert not any((folder / "run").glob("*"))


def test_no_text_that_is_held_out_was_learned_under_another_id(folder, command, capsys):
    rows = [{"context": "", "question": f"Who is {name}?", "answer": name} for name in "abcdef"]
    write_rows(folder / "rows.jsonl", [*rows[:4], *rows])
    line = ["--model", folder / "dense", "--experts", 8, "--top-k", 4, "--shared", 4, "--epochs", 0, "--fit-texts", 2]
    line += ["--data", folder / "rows.jsonl", "--texts", 4, "--out", folder / "run"]
    command(split_command.main, *line, "--held-out", 3, code=2)
    assert "has 6 unlike ones that fit" in capsys.readouterr().err


def test_a_token_that_the_model_has_no_embedding_of_is_named(tokenizer, folder, command, capsys):
    dense = dense_model(tokenizer)
    dense.resize_token_embeddings(20)
    dense.save_pretrained(folder / "dense")
    line = ["--model", folder / "dense", "--experts", 8, "--top-k", 4, "--shared", 4, "--epochs", 0, "--fit-texts", 2]
    command(split_command.main, *line, "--data", "swap", "--texts", 4, "--out", folder / "run", code=2)
    assert "has embeddings of 20" in capsys.readouterr().err


def test_a_layer_that_writes_nothing_has_no_error(tokenizer, prompts):
    teacher = dense_model(tokenizer)
    teacher.model.layers[0].mlp.down_proj.weight.data.zero_()
    errors = layer_errors(teacher, split(teacher, prompts[:2], PARTS), mlp_inputs(teacher, prompts[:2]))
    assert errors[0] == 0 < errors[1]


def test_without_the_model_one_message_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path))
    with pytest.raises(MoELensError, match="`make english` makes it"):
        MoELens.from_pretrained("english")
