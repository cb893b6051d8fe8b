"""Temperature beyond text: Whisper's word errors by stack, DINOv2's features, both under noise.

    python benchmarks/beyond_text.py [--quick] [--part whisper|dinov2|figure]

Needs the models whisper-tiny.en and dinov2-small (`make models`), and espeak-ng, which speaks
sentences of the package's own texts. Writes benchmarks/results/beyond_text.json; the part figure
draws docs/images/dinov2-attention.png, maps of attention at T = .5, 1, 2 over a photograph that
comes with scikit-learn.

    whisper    word error rate and loss on transcripts over T, in the encoder, the decoder and the
               cross-attention; then temperatures per head learned from noisy speech
    dinov2     1 - cosine of features, accuracy of 5 nearest neighbours on scikit-learn's digits
               over T; then temperatures per head learned under noise: towards the features of the
               clean image, and to less entropy of attention, from one image, as AttenDence does
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import _bench
import numpy as np
import torch
import transformers

from tempering import Profile, load_model, sample_text, tempered
from tempering.attention.tuning import from_functions, from_inputs, tune
from tempering.evaluation.clusters import cluster_bootstrap
from tempering.evaluation.cost import Variant, measure_costs
from tempering.evaluation.paired import IntervalEstimate
from tempering.inputs import read_inputs
from tempering.inputs.sound import read_sound

FIGURE = Path(__file__).parents[1] / "docs/images/dinov2-attention.png"
TEMPERATURES = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)
# Chosen on what temperatures are learned from, never on what is reported.
SNRS = (20.0, 15.0, 10.0, 5.0, 0.0)  # decibels of speech over white noise
WRONG = 0.3  # of the words: the noise is the one that Whisper comes nearest to this under
SIZES = (56, 112, 168)  # pixels of a digit of 8 x 8, smoothed: the one best told apart
NOISES = (0.02, 0.04, 0.07, 0.1, 0.15)  # standard deviation on digits, whose ink is 1
RIGHT = 2 / 3  # of the digits told apart without noise: the noise is the one nearest to this
NEIGHBOURS = 5


def difference(
    after: np.ndarray, before: np.ndarray, weights: np.ndarray | None = None
) -> IntervalEstimate:
    """Mean of after - before over units, with a bootstrap interval (2000 draws)."""
    weights = np.ones(len(after)) if weights is None else weights
    values = torch.tensor((after - before) / weights, dtype=torch.float64)
    units = torch.tensor(weights, dtype=torch.float64)
    return cluster_bootstrap(values, units, torch.arange(len(after)), seed=0, draws=2000)


def told(item: IntervalEstimate) -> str:
    return f"{item.value:+.4f} [{item.low:+.4f}, {item.high:+.4f}]"


# -- speech


def sentences(count: int) -> list[str]:
    """Sentences of 6 to 16 plain words, spread over the package's fiction."""
    text = re.sub(r"\s+", " ", sample_text("fiction"))
    every = [part.strip(" \"'") for part in re.split(r"(?<=[.!?])\s", text)]
    plain = [s for s in every if re.fullmatch(r"[A-Za-z ,;.']+", s) and 6 <= len(s.split()) <= 16]
    places = np.linspace(0, len(plain) - 1, count).round().astype(int)
    return [plain[place] for place in places]


def speak(folder: Path, texts: list[str], snr: float | None) -> None:
    """A WAV file of each sentence, with its transcript beside it; snr: over noise, decibels."""
    from scipy.io import wavfile

    folder.mkdir()
    for i, text in enumerate(texts):
        path = folder / f"{i:03d}.wav"
        subprocess.run(
            ["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(path), text], check=True, timeout=60
        )
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        samples = read_sound(path, 16000, lambda line: None)
        if snr is not None:
            power = float((samples**2).mean()) / 10 ** (snr / 10)
            noise = np.random.default_rng(i).normal(0, power**0.5, len(samples))
            samples = (samples + noise).astype(np.float32)
        wavfile.write(path, 16000, samples)


def words_of(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split()


def errors(said: list[str], heard: list[str]) -> int:
    """Words put in, left out and put otherwise: the edit distance."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def transcribe(model: Any, processor: Any, inputs: Any, rows: int = 8) -> list[str]:
    """Greedy transcripts, `rows` side by side."""
    found = []
    features = [example.arguments["input_features"] for example in inputs]
    for start in range(0, len(features), rows):
        part = torch.cat(features[start : start + rows])
        with torch.no_grad():
            ids = model.generate(part, do_sample=False, num_beams=1, max_new_tokens=60)
        found += processor.batch_decode(ids, skip_special_tokens=True)
    return found


def word_errors(
    model: Any, processor: Any, inputs: Any, texts: list[str], profile: Profile | None
) -> np.ndarray:
    context = tempered(model, profile) if profile is not None else contextlib.nullcontext()
    with context:
        heard = transcribe(model, processor, inputs)
    return np.array([errors(words_of(a), words_of(b)) for a, b in zip(texts, heard, strict=True)])


def whisper(quick: bool) -> dict[str, Any]:
    count = 12 if quick else 40
    model, processor = load_model("whisper-tiny.en")
    texts = sentences(2 * count)
    tests, lessons = texts[::2], texts[1::2]
    lengths = np.array([len(words_of(text)) for text in tests], dtype=float)
    report: dict[str, Any] = {"sentences": count, "words": int(lengths.sum())}
    with tempfile.TemporaryDirectory() as place:

        def spoken(name: str, said: list[str], snr: float | None) -> Any:
            speak(Path(place) / name, said, snr)
            return read_inputs("audio", Path(place) / name, model, processor)

        heard = {snr: spoken(f"lessons {snr:g}", lessons, snr) for snr in SNRS}
        wrong = {}
        for snr, inputs in heard.items():
            words = sum(len(words_of(text)) for text in lessons)
            wrong[snr] = float(word_errors(model, processor, inputs, lessons, None).sum() / words)
        snr = min(SNRS, key=lambda snr: abs(wrong[snr] - WRONG))
        sets = {
            "clean": spoken("clean", tests, None),
            "noisy": spoken("noisy", tests, snr),
            "lessons": heard[snr],
        }
    report |= {
        "snr_db": snr,
        "lessons: word error rate": {f"{k:g} dB": v for k, v in wrong.items()},
    }
    print(f"lessons: word error rate {wrong}; noise at {snr:g} dB")
    base = {}
    for name in ("clean", "noisy"):
        base[name] = word_errors(model, processor, sets[name], tests, None)
        rate = base[name].sum() / lengths.sum()
        report[f"{name}: word error rate"] = rate
        print(f"whisper, {name}: word error rate {rate:.3f} of {int(lengths.sum())} words")
    rows = []
    for stack in ("encoder", "decoder", "cross"):
        variants = [
            Variant(f"{t:g}", Profile.from_schedule(f"constant({t})", model, stack=stack))
            for t in (TEMPERATURES[1::2] if quick else TEMPERATURES)
        ]
        costs, _ = measure_costs(model, sets["clean"], variants)
        for variant, cost in zip(variants, costs, strict=True):
            own = word_errors(model, processor, sets["clean"], tests, variant.profile)
            change = difference(own, base["clean"], lengths)
            row = {
                "stack": stack,
                "T": float(variant.label),
                "word error rate": float(own.sum() / lengths.sum()),
                "change": change._asdict(),
                "cost": cost.cost._asdict(),
            }
            rows.append(row)
            print(
                f"{stack:8s} T {variant.label:4s} WER {row['word error rate']:.3f} "
                f"{told(change)}   loss {told(cost.cost)} nats/token"
            )
    report["by stack"] = rows
    report["learned"] = learned_speech(model, processor, sets, tests, lengths, base, quick)
    return report


def learned_speech(
    model: Any,
    processor: Any,
    sets: dict[str, Any],
    texts: list[str],
    lengths: np.ndarray,
    base: dict[str, np.ndarray],
    quick: bool,
) -> list[dict[str, Any]]:
    """Temperatures per head, learned from noisy speech, on sentences that were not heard."""
    rows = []
    for per in ("head",) if quick else ("head", "layer"):
        start = time.monotonic()
        goal = from_inputs("noisy speech", sets["lessons"], model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = tune(model, goal, per=per, steps=2 if quick else 5)
        for name in ("noisy", "clean"):
            (cost,), _ = measure_costs(model, sets[name], [Variant("tuned", tuned.profile)])
            own = word_errors(model, processor, sets[name], texts, tuned.profile)
            change = difference(own, base[name], lengths)
            rows.append(
                {
                    "per": per,
                    "numbers": len(tuned.names),
                    "test": name,
                    "loss": cost.cost._asdict(),
                    "untempered loss": cost.untempered_nll,
                    "word error rate": float(own.sum() / lengths.sum()),
                    "change": change._asdict(),
                    "seconds": time.monotonic() - start,
                }
            )
            print(
                f"learned per {per} from noisy speech, on {name}: loss {told(cost.cost)} of "
                f"{cost.untempered_nll:.3f}, WER {rows[-1]['word error rate']:.3f} {told(change)}"
            )
    return rows


# -- images


def digits(count: int, size: int) -> tuple[torch.Tensor, np.ndarray]:
    """Float[Tensor, "count 3 size size"], 0 to 1, and what each says; in a seeded order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[:count]
    small = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)
    return large.expand(-1, 3, -1, -1), data.target[order]


def normalised(images: torch.Tensor) -> torch.Tensor:
    """As DINOv2 was trained: ImageNet's mean and deviation of each colour."""
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (images - mean[:, None, None]) / deviation[:, None, None]


def features(model: Any, images: torch.Tensor, profile: Profile | None = None) -> torch.Tensor:
    """The class token's last hidden state of every image."""
    context = tempered(model, profile) if profile is not None else contextlib.nullcontext()
    with context, torch.no_grad():
        parts = [model(pixel_values=part).last_hidden_state[:, 0] for part in images.split(50)]
    return torch.cat(parts)


def right(kept: torch.Tensor, labels: np.ndarray, asked: torch.Tensor, truth: np.ndarray) -> Any:
    """Whether the nearest neighbours of each image, by cosine, name it rightly."""
    from sklearn.neighbors import KNeighborsClassifier

    judge = KNeighborsClassifier(NEIGHBOURS, metric="cosine").fit(kept.numpy(), labels)
    return (judge.predict(asked.numpy()) == truth).astype(float)


def noise_like(images: torch.Tensor) -> torch.Tensor:
    """Grey noise of deviation 1 on every pixel, the same in all colours."""
    return torch.randn(images[:, :1].shape, generator=torch.Generator().manual_seed(0))


def settings(model: Any, kept: int) -> tuple[int, float, dict[str, float]]:
    """Size and noise, by the second half of the kept digits told apart by the first."""
    half = kept // 2

    def accuracy(size: int, sd: float) -> float:
        images, labels = digits(kept, size)
        bank = features(model, normalised(images[:half]))
        asked = features(model, normalised(images[half:] + noise_like(images[half:]) * sd))
        return float(right(bank, labels[:half], asked, labels[half:]).mean())

    sizes = {size: accuracy(size, 0.0) for size in SIZES}
    size = max(SIZES, key=lambda size: sizes[size])
    noises = {sd: accuracy(size, sd) for sd in NOISES}
    sd = min(NOISES, key=lambda sd: abs(noises[sd] - RIGHT * sizes[size]))
    found = {f"{size} pixels": value for size, value in sizes.items()}
    found |= {f"noise {sd:g}": value for sd, value in noises.items()}
    print(f"dinov2, kept digits: {found}; {size} pixels, noise {sd:g}")
    return size, sd, found


def dinov2(quick: bool) -> dict[str, Any]:
    model, _ = load_model("dinov2-small")
    kept_count, asked_count = (150, 100) if quick else (500, 300)
    size, sd, chosen = settings(model, kept_count)
    images, labels = digits(kept_count + asked_count + 16, size)
    clean, noisy = normalised(images), normalised(images + noise_like(images) * sd)
    kept, asked = slice(0, kept_count), slice(kept_count, kept_count + asked_count)
    spare = slice(kept_count + asked_count, None)
    bank, truth = features(model, clean[kept]), labels[asked]
    base = {
        name: right(bank, labels[kept], features(model, data[asked]), truth)
        for name, data in (("clean", clean), ("noisy", noisy))
    }
    report: dict[str, Any] = {
        "kept": kept_count,
        "asked": asked_count,
        "size": size,
        "noise": sd,
        "chosen on the kept": chosen,
        **{f"{name}: accuracy": float(found.mean()) for name, found in base.items()},
    }
    for name, found in base.items():
        print(f"dinov2, {name} digits: {NEIGHBOURS}-NN accuracy {found.mean():.3f}")
    profiles = {
        f"T {t:g}": Profile.from_schedule(f"constant({t})", model)
        for t in (TEMPERATURES[1::2] if quick else TEMPERATURES)
    }
    profiles |= learned_images(model, clean[spare], noisy[spare], quick)
    rows = []
    moved, _ = measure_costs(
        model,
        {"pixel_values": clean[asked][: 10 if quick else 40]},
        [Variant(label, profile) for label, profile in profiles.items()],
    )
    for (label, profile), cost in zip(profiles.items(), moved, strict=True):
        row: dict[str, Any] = {"label": label, "1 - cosine": cost.cost._asdict()}
        # The bank is tempered too where temperature is a setting of the model, and where it was
        # learned under noise it stays what it was.
        own = bank if not label.startswith("T ") else features(model, clean[kept], profile)
        for name, data in (("clean", clean), ("noisy", noisy)):
            found = right(own, labels[kept], features(model, data[asked], profile), truth)
            change = difference(found, base[name])
            row[name] = {"accuracy": float(found.mean()), "change": change._asdict()}
        rows.append(row)
        print(
            f"{label:40s} 1 - cosine {cost.cost.value:.4f}   "
            + "   ".join(
                f"{name} {row[name]['accuracy']:.3f} "
                f"[{row[name]['change']['low']:+.3f}, {row[name]['change']['high']:+.3f}]"
                for name in ("clean", "noisy")
            )
        )
    report["rows"] = rows
    return report


def learned_images(
    model: Any, clean: torch.Tensor, noisy: torch.Tensor, quick: bool
) -> dict[str, Profile]:
    """Temperatures per head under noise, learned from images that are asked for nowhere."""
    wanted = features(model, clean)

    def towards(place: int) -> Any:
        def loss(subject: Any) -> torch.Tensor:
            got = subject(pixel_values=noisy[place : place + 1]).last_hidden_state[0, 0]
            return 1 - torch.nn.functional.cosine_similarity(got, wanted[place], dim=0)

        return loss

    def entropy(place: int) -> Any:
        def loss(subject: Any) -> torch.Tensor:
            out = subject(pixel_values=noisy[place : place + 1], output_attentions=True)
            rows = torch.stack([layer[0, :, 0, 1:] for layer in out.attentions])
            rows = rows / rows.sum(-1, keepdim=True)
            return -(rows * rows.clamp(min=1e-9).log()).sum(-1).mean()

        return loss

    found = {}
    model.set_attn_implementation("eager")  # which shows its weights
    steps = {"method": "adam", "steps": 6 if quick else 20, "held_out": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = 4 if quick else len(clean)
        goal = from_functions("clean features", [towards(i) for i in range(count)])
        found["learned towards clean features"] = tune(model, goal, rate=0.05, **steps).profile
        for place in range(1 if quick else 3):
            goal = from_functions("entropy", [entropy(place)])
            found[f"learned to less entropy, image {place}"] = tune(
                model, goal, rate=0.05, bounds=(0.5, 2.0), **steps
            ).profile
    model.set_attn_implementation("sdpa")
    return found


def figure() -> Path:
    """Maps of the class token's attention in the last layer, over a photograph."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image
    from sklearn.datasets import load_sample_images

    model, _ = load_model("dinov2-small", attn_implementation="eager")
    photograph = next(
        image
        for image, name in zip(load_sample_images().images, load_sample_images().filenames)
        if "flower" in str(name)
    )
    side = 14 * 30
    image = Image.fromarray(photograph).resize((side * 3 // 2 // 14 * 14, side))
    pixels = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1) / 255
    rows, columns = side // 14, image.width // 14
    plot, axes = plt.subplots(1, 4, figsize=(12, 2.4), layout="constrained")
    axes[0].imshow(image)
    axes[0].set_title("photograph")
    for ax, t in zip(axes[1:], (0.5, 1.0, 2.0), strict=True):
        profile = Profile.from_schedule(f"constant({t})", model)
        with tempered(model, profile), torch.no_grad():
            out = model(pixel_values=normalised(pixels[None]), output_attentions=True)
        last = out.attentions[-1][0, :, 0, 1:]
        alive = float((-(last * last.clamp(min=1e-12).log()).sum(-1)).mean().exp())
        ax.imshow(last.mean(0).view(rows, columns).sqrt(), cmap="magma")
        ax.set_title(f"T = {t:g}: {alive:.0f} patches alive")
    for ax in axes:
        ax.axis("off")
    FIGURE.parent.mkdir(exist_ok=True)
    plot.savefig(FIGURE, dpi=100)
    return FIGURE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Few sentences and images.")
    parser.add_argument("--part", choices=["whisper", "dinov2", "figure"], action="append")
    options = parser.parse_args()
    parts = options.part or ["whisper", "dinov2", "figure"]
    transformers.logging.set_verbosity_error()  # `generate` warns of what Whisper brings along
    for name, part in (("whisper-tiny.en", whisper), ("dinov2-small", dinov2)):
        if name.split("-")[0] in parts:
            report = part(options.quick)
            if not options.quick:  # as soon as it is there: what comes next may be killed
                print(_bench.write("beyond_text", report, model=name))
    if "figure" in parts:
        print(figure())
    return 0


if __name__ == "__main__":
    sys.exit(main())
