"""Models in the hands of PyTorch's ecosystem: PEFT, transformers' Trainer, accelerate."""

import numpy as np
import pytest
from harness import config_of, load_backend, token_ids

from opt_core.lora import LoraConfig
from opt_core.optimization import TrainingRecipe
from opt_torch import OPTForCausalLM
from opt_torch.lora import add_lora, load_adapter, merge_lora, save_adapter
from opt_torch.training import Trainer

torch = pytest.importorskip("torch")


def model_of(task: str = "causal-lm", **changes):
    return load_backend("torch").random_model(config_of(**changes), task)


def ids_of(config, rows: int = 4) -> "torch.Tensor":
    return torch.as_tensor(token_ids(config, rows))


# -- PEFT -------------------------------------------------------------------------------------------------------------

TARGETS = ["q_proj", "v_proj", "fc2"]


def with_peft(task: str = "causal-lm", **changes):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=TARGETS)
    return peft.get_peft_model(model_of(**changes), config)


def descend(model, steps: int = 3) -> list[float]:
    ids = ids_of(config_of())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_peft_trains_a_model_and_leaves_its_weights_alone():
    model = with_peft()
    base = {name: p for name, p in model.named_parameters() if "lora" not in name}
    before = {name: p.detach().clone() for name, p in base.items()}
    losses = descend(model)
    assert losses[-1] < losses[0] - 0.1
    assert all((p == before[name]).all() and not p.requires_grad for name, p in base.items())


def test_an_adapter_of_peft_loads_here_and_merges_to_the_same(tmp_path):
    peft_model = with_peft()
    descend(peft_model)
    peft_model.save_pretrained(tmp_path)
    model, ids = model_of(), ids_of(config_of())
    load_adapter(model, tmp_path)
    want = peft_model(input_ids=ids).logits
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-6)
    text = peft_model.generate(input_ids=ids, max_new_tokens=3)
    assert (model.generate(ids, max_new_tokens=3) == text).all()
    merge_lora(model)
    merged = peft_model.merge_and_unload()
    assert type(merged) is OPTForCausalLM
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged(ids).logits, want, rtol=0, atol=1e-4)


def test_our_adapter_loads_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = model_of(), ids_of(config_of())
    add_lora(model, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    trainer = Trainer(model, TrainingRecipe(learning_rate=0.02))
    for _ in range(3):
        trainer.step(dict(input_ids=ids, labels=ids))
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_of(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)
    published = pytest.importorskip("transformers").OPTForCausalLM
    model_of().save_pretrained(tmp_path / "base")
    base = published.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_an_adapter_starts_as_nothing_and_alone_is_trained():
    model, ids = model_of(dropout=0.1), ids_of(config_of())
    want = model(ids).logits
    add_lora(model, LoraConfig(r=3, lora_dropout=0.2))
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model, TrainingRecipe(learning_rate=0.02))
    losses = [trainer.step(dict(input_ids=ids, labels=ids)) for _ in range(4)]
    assert losses[-1] < losses[0]
    changed = {name.rpartition(".")[2] for name, p in model.named_parameters() if (p != before[name]).any()}
    assert changed == {"lora_A", "lora_B"}
    got = model.eval()(ids).logits
    assert (got - want).abs().max() > 1e-3
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, got, rtol=0, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_half_precision_weights_is_float32(dtype):
    model = load_backend("torch").random_model(config_of(), dtype=dtype)
    ids, want = ids_of(config_of()), model(ids_of(config_of())).logits
    add_lora(model, LoraConfig(r=3, target_modules=TARGETS))
    out = model(ids, labels=ids)
    assert (out.logits == want).all()
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert model.generate(ids, max_new_tokens=2).shape == (4, 15)


# -- transformers' Trainer --------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, config, rows: int = 8):
        self.ids = ids_of(config, rows)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return dict(input_ids=self.ids[i], labels=self.ids[i])


def hugging_face_trainer(folder, steps: int, *, metrics: bool = False, **options):
    transformers = pytest.importorskip("transformers")
    arguments = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        per_device_eval_batch_size=5,
        save_safetensors=False,  # a state dict whose head is tied is none for safetensors
        seed=3,
    )

    class LogitsAlone(transformers.Trainer):
        """Its metrics take every output, and fail at those that are None."""

        def prediction_step(self, *args, **kwargs):
            loss, outputs, labels = super().prediction_step(*args, **kwargs)
            return loss, outputs if outputs is None else outputs[0], labels

    model = model_of(dropout=0.1, use_cache=not metrics)
    return (LogitsAlone if metrics else transformers.Trainer)(
        model=model,
        args=transformers.TrainingArguments(**(arguments | options)),
        train_dataset=Rows(model.config),
        eval_dataset=Rows(model.config, 5),
        compute_metrics=hits if metrics else None,
    )


def hits(found) -> dict[str, float]:
    assert found.predictions.shape == (5, 13, 97)
    return {"hits": float((found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]).mean())}


def losses_of(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("metrics", [False, True], ids=["loss alone", "metrics"])
def test_transformers_trainer_trains_evaluates_saves_and_resumes(tmp_path, metrics):
    unbroken = hugging_face_trainer(tmp_path / "unbroken", 4, metrics=metrics)
    unbroken.train()
    losses = losses_of(unbroken)
    assert losses[-1] < losses[0]
    found = unbroken.evaluate()
    ids = Rows(unbroken.model.config, 5).ids
    assert found["eval_loss"] == pytest.approx(unbroken.model.eval()(ids, labels=ids).loss.item(), rel=1e-5)
    assert not metrics or 0 < found["eval_hits"] <= 1
    resumed = hugging_face_trainer(tmp_path / "unbroken", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-2"))
    assert losses_of(resumed) == losses
    for got, want in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_transformers_trainer_recomputes_layers_and_accumulates(tmp_path):
    plain = hugging_face_trainer(tmp_path / "plain", 2)
    plain.train()
    frugal = hugging_face_trainer(
        tmp_path / "frugal", 2, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    frugal.train()
    assert frugal.model.is_gradient_checkpointing
    assert losses_of(frugal) == losses_of(plain)
    in_parts = hugging_face_trainer(tmp_path / "parts", 2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    in_parts.model.config.dropout = 0.0
    in_parts.train()
    np.testing.assert_allclose(losses_of(in_parts), losses_of(plain), atol=0.3)  # other dropout


def test_the_recipe_is_an_optimizer_for_transformers_trainer(tmp_path):
    from opt_torch.optimization import make_optimizer

    recipe = TrainingRecipe(learning_rate=0.01, warmup_steps=1, total_steps=3)
    trainer = hugging_face_trainer(tmp_path, 3, max_grad_norm=recipe.max_gradient_norm)
    trainer.optimizer, trainer.lr_scheduler = make_optimizer(trainer.model, recipe)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([recipe.learning_rate_at(step) for step in range(3)], rel=1e-3)


# -- accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_runs_a_plain_loop(mixed_precision, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    twin, model = model_of(), model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = torch.utils.data.DataLoader(Rows(model.config), batch_size=4)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    want = descend_plainly(twin.train())
    losses = []
    for batch in rows:
        out = model.train()(**batch)
        assert out.logits.dtype == torch.float32
        accelerator.backward(out.loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses == pytest.approx(want, rel=1e-6 if mixed_precision == "no" else 0.02)
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def descend_plainly(model) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for batch in torch.utils.data.DataLoader(Rows(model.config), batch_size=4):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
