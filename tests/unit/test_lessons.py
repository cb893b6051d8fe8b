"""Lessons of a teacher: the divergence against float64 sums, and files that are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempering.attention.tuning.lessons import Lesson, distributions, lesson_losses
from tempering.errors import DataError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def coarse_kl(teacher: np.ndarray, student: np.ndarray, top: int) -> np.ndarray:
    """KL of the two distributions once all but the teacher's `top` tokens count as one."""
    found = []
    for p_row, q_row in zip(np.exp(log_softmax(teacher)), np.exp(log_softmax(student))):
        best = np.argsort(-p_row, kind="stable")[:top]
        rest = np.setdiff1d(np.arange(len(p_row)), best)
        p = np.append(p_row[best], p_row[rest].sum()) if len(rest) else p_row[best]
        q = np.append(q_row[best], q_row[rest].sum()) if len(rest) else q_row[best]
        some = p > 0
        found.append((p[some] * np.log(p[some] / q[some])).sum())
    return np.array(found)


def lesson_of(tmp_path: Path, teacher: np.ndarray, top: int | None, name: str = "a") -> Lesson:
    lesson = Lesson(tmp_path / f"{name}.safetensors", f"identity {name}")
    lesson.write(distributions(torch.from_numpy(teacher).float(), top))
    return lesson


@pytest.mark.parametrize("top", [1, 3, 19, 20, 50, None])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_divergence_is_that_of_float64_sums(
    tmp_path: Path, top: int | None, scale: float
) -> None:
    rng = np.random.default_rng(1)
    teacher, student = scale * rng.normal(size=(2, 7, 20))
    lesson = lesson_of(tmp_path, teacher, top)
    found = lesson_losses(torch.from_numpy(student), [lesson])
    wanted = coarse_kl(teacher.astype(np.float32).astype(float), student, top or 20)
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=2e-5, atol=2e-6)


@given(seed=st.integers(0, 10**6), top=st.integers(1, 11))
def test_it_is_at_most_the_full_divergence_and_never_negative(seed: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    teacher, student = 3 * rng.normal(size=(2, 4, 12))
    coarse, full = (coarse_kl(teacher, student, k) for k in (top, 12))
    assert (coarse <= full + 1e-12).all() and (coarse >= -1e-12).all()


def test_its_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    teacher, student = rng.normal(size=(2, 5, 9))
    lesson = lesson_of(tmp_path, teacher, 3)
    logits = torch.from_numpy(student).requires_grad_()
    (gradient,) = torch.autograd.grad(lesson_losses(logits, [lesson]).sum(), logits)
    wanted = np.zeros_like(student)
    for place in np.ndindex(*student.shape):
        ends = []
        for step in (1e-6, -1e-6):
            moved = student.copy()
            moved[place] += step
            ends.append(coarse_kl(teacher.astype(np.float32).astype(float), moved, 3).sum())
        wanted[place] = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(gradient.numpy(), wanted, atol=3e-5)


def test_a_student_that_rules_a_token_out_is_infinitely_far(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path, np.array([[0.0, 1.0, 0.0, 0.0]]), 2)
    student = torch.tensor([[0.0, -torch.inf, 0.0, 0.0]])
    assert lesson_losses(student, [lesson]).item() == torch.inf


def test_a_teacher_that_rules_a_token_out_says_nothing_of_it(tmp_path: Path) -> None:
    teacher = np.array([[0.0, 0.0, -np.inf, -np.inf]])
    student = torch.tensor([[0.3, 0.1, 0.2, 0.0]])
    found = lesson_losses(student, [lesson_of(tmp_path, teacher, None)])
    log_q = torch.log_softmax(student.double(), -1)[0, :2]
    assert found.item() == pytest.approx((0.5 * (np.log(0.5) - log_q)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("top", [2, None])
def test_a_student_that_is_no_number_is_not_taken_for_a_perfect_one(
    tmp_path: Path, top: int | None
) -> None:
    teacher = np.array([[1.0, 0.0, -1.0, 0.5], [1.0, 0.0, -np.inf, 0.5]])
    lesson = lesson_of(tmp_path, teacher, top)
    student = torch.tensor([[0.1, torch.nan, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    losses = lesson_losses(student, [lesson])
    assert losses[0].isnan() and losses[1].isfinite()
    losses[1].backward()
    assert student.grad is not None and student.grad[1].isfinite().all()


def test_rows_of_several_lessons_follow_each_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    first, second, one, two = rng.normal(size=(4, 3, 6))
    lessons = [lesson_of(tmp_path, first, 2, "a"), lesson_of(tmp_path, second, 2, "b")]
    found = lesson_losses(torch.from_numpy(np.concatenate([one, two])), lessons)
    for part, lesson, student in ((found[:3], lessons[0], one), (found[3:], lessons[1], two)):
        assert torch.equal(part, lesson_losses(torch.from_numpy(student), [lesson]))


def test_a_lesson_of_another_teacher_is_refused(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path, np.zeros((1, 4)), 2)
    with pytest.raises(DataError, match="another teacher, text or number of tokens; delete it"):
        Lesson(lesson.path, "identity b").read()


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_a_damaged_lesson_is_named(tmp_path: Path, damage: str) -> None:
    lesson = lesson_of(tmp_path, np.zeros((4, 4)), 2)
    content = lesson.path.read_bytes()
    lesson.path.unlink()
    if damage == "cut":
        lesson.path.write_bytes(content[: len(content) // 2])
    if damage == "text":
        lesson.path.write_text("not a lesson")
    with pytest.raises(DataError, match=r"a\.safetensors is no lesson that can be read"):
        lesson.read()


def test_a_lesson_for_another_number_of_targets_is_refused(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path, np.zeros((4, 6)), 2)
    with pytest.raises(DataError, match="4 targets where 3 are predicted"):
        lesson_losses(torch.zeros(3, 6), [lesson])


def test_a_student_with_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path, np.arange(6.0)[None], 2)
    with pytest.raises(DataError, match="knows the token 5, and this model has a vocabulary of 4"):
        lesson_losses(torch.zeros(1, 4), [lesson])
