"""Annealing in training loops: the path of temperatures, and resuming on it."""

import math

import pytest
import torch
from torch import nn

from tempering.errors import ScheduleError
from tempering.posterior import free_energy
from tempering.schedules import schedule
from tempering.temperature import Fixed, Learned, Scheduled, Targeted
from tempering.training import ScheduleStepper, trainer_callback

ANNEALING = "geometric(4,0.25)"


class Mixture(nn.Module):
    """Prototypes that compete for points: soft clustering by implicit EM at a scheduled T."""

    def __init__(self, temperature):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.centres = nn.Parameter(0.01 * torch.randn(3, 2, generator=draw))
        self.temperature = temperature

    def forward(self, points):
        d = (points.unsqueeze(1) - self.centres).square().sum(-1)
        return free_energy(d, self.temperature(d)).mean()


def points():
    draw = torch.Generator().manual_seed(1)
    middles = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return middles.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 2, generator=draw)


def train(model, optimizer, stepper, steps):
    """A plain loop; returns the temperature of each step."""
    path = []
    for _ in range(steps):
        path.append(model.temperature(torch.zeros(1, 1, dtype=torch.float64)).item())
        optimizer.zero_grad()
        model(points()).backward()
        optimizer.step()
        stepper.step()
    return path


def fresh(total=60):
    model = Mixture(Scheduled(ANNEALING))
    return model, torch.optim.SGD(model.parameters(), lr=0.8), ScheduleStepper(model, total)


def test_a_training_loop_anneals_on_the_clock_of_its_steps():
    model, optimizer, stepper = fresh()
    path = train(model, optimizer, stepper, 60)
    assert path == pytest.approx([4 * (1 / 16) ** (i / 59) for i in range(60)], rel=1e-12)
    assert path == pytest.approx(schedule(ANNEALING).sample(60).tolist(), rel=1e-14)
    assert stepper.progress == 1 and model.temperature().item() == 0.25
    # and so each prototype found its cluster, from a start at one place
    found = torch.cdist(points()[::20], model.centres.detach()).amin(1)
    assert found.max() < 0.3


def test_a_resumed_run_follows_the_same_path(tmp_path):
    whole_model, optimizer, stepper = fresh()
    whole = train(whole_model, optimizer, stepper, 60)

    model, optimizer, stepper = fresh()
    first = train(model, optimizer, stepper, 23)
    parts = {"model": model, "optimizer": optimizer, "stepper": stepper}
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state, tmp_path / "checkpoint.pt")

    model, optimizer, stepper = fresh()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, part in {"model": model, "optimizer": optimizer, "stepper": stepper}.items():
        part.load_state_dict(saved[name])
    assert first + train(model, optimizer, stepper, 37) == whole
    assert torch.equal(model.centres, whole_model.centres)


def test_every_clock_inside_moves_once():
    shared = Scheduled("linear(0,1)")
    model = nn.ModuleList([shared, Fixed(1), nn.Sequential(Targeted("linear(2,3)")), Learned()])
    stepper = ScheduleStepper([model, shared], 11)
    assert len(stepper.clocks) == 2
    for _ in range(5):
        stepper.step()
    assert stepper.progress == 0.5
    assert shared().item() == 0.5 and model[2][0].reading.item() == 2.5


def test_beginning_a_run_puts_the_clocks_at_its_start():
    module = Scheduled("linear(0,1)")
    module.step(0.7)
    ScheduleStepper(module, 5)
    assert module.progress.item() == 0


def test_a_run_of_one_step():
    module = Scheduled("constant(2)")
    stepper = ScheduleStepper(module, 1)
    stepper.step()
    assert module.progress.item() == 0 and stepper.state_dict() == {
        "completed": 1,
        "total_steps": 1,
    }


def test_what_a_stepper_refuses():
    module = Scheduled("throb(12,3,1,12)")
    with pytest.raises(ScheduleError, match="no Scheduled or Targeted temperature is inside Linea"):
        ScheduleStepper(nn.Linear(1, 1), 10)
    with pytest.raises(ScheduleError, match="is inside an empty list"):
        ScheduleStepper([], 10)
    with pytest.raises(ScheduleError, match="total_steps = 0; expected a whole number, 1 or more"):
        ScheduleStepper(module, 0)
    with pytest.raises(ScheduleError, match="has 4 stages and can't show them in 3 training steps"):
        ScheduleStepper(module, 3)
    stepper = ScheduleStepper(module, 4)
    for _ in range(4):
        stepper.step()
    with pytest.raises(ScheduleError, match="5 completed steps lie outside this run of 4"):
        stepper.step()
    assert stepper.completed == 4
    with pytest.raises(ScheduleError, match="checkpoint is of a run of 9 steps and this run has 4"):
        stepper.load_state_dict({"completed": 2, "total_steps": 9})


class TinyWithTemperature(nn.Module):
    """A random two-layer Llama whose logits are tempered; records T of each training step."""

    def __init__(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=13,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        self.llama = LlamaForCausalLM(config)
        self.temperature = Scheduled("geometric(4,0.25)")
        self.path = []

    def forward(self, input_ids, labels):
        d = -self.llama(input_ids=input_ids).logits[:, :-1]
        level = self.temperature(d)
        self.path.append(level.item())
        return {
            "loss": nn.functional.cross_entropy((-d / level).flatten(0, 1), labels[:, 1:].flatten())
        }


@pytest.fixture
def trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    def make(steps=6, save=3, accumulate=1):
        torch.manual_seed(0)
        model = TinyWithTemperature()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=save,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulate,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            seed=0,
        )
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(0, 13, (8, 5), generator=draw)
        data = [{"input_ids": row, "labels": row} for row in rows]
        callback = trainer_callback(model)
        return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])

    return make


def want(steps):
    return [4 * (1 / 16) ** (i / (steps - 1)) for i in range(steps)]


def test_a_trainer_anneals_and_resumes_on_the_same_path(trainer, tmp_path):
    whole = trainer()
    whole.train()
    assert whole.model.path == pytest.approx(want(6), rel=1e-6)

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.model.path == whole.model.path[3:]
    for got, expected in zip(resumed.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(got, expected)


def test_gradient_accumulation_is_one_step(trainer):
    run = trainer(steps=3, save=100, accumulate=2)
    run.train()
    assert run.model.path == pytest.approx([t for t in want(3) for _ in range(2)], rel=1e-6)
    assert math.isclose(run.model.temperature().item(), 0.25)


def test_a_trainer_too_short_for_the_pattern_is_refused(trainer):
    run = trainer(steps=1)
    with pytest.raises(ScheduleError, match="has 2 stages and can't show them in 1 training steps"):
        run.train()
