"""A tiny random model, its tokenizer, and generate() under a policy, for the tests of tokens."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tempering.tokens import TemperingLogitsProcessor, temper_logits
from tempering.tokens.engine_check import VOCABULARY

PAD, END, OPEN, CLOSE = 0, 1, 3, 4
PHASES = f"phases(thinking=between(1.5, ids({OPEN}), ids({CLOSE})), answer=0.5)"
PROMPT = torch.tensor([[5, OPEN, 7, 8], [PAD, PAD, 9, 10]])  # the second is padded on the left
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def tiny_model():
    """Two layers, 32 tokens, weights large enough for lively logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.6,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer():
    """One byte-level character a token: enough for a trace's text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY]
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def generate(
    model, policy, ids=PROMPT, mask=MASK, *, seed=0, tokenizer=None, trace=None, **settings
):
    torch.manual_seed(seed)
    processor = TemperingLogitsProcessor(policy, tokenizer, trace=trace)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 10} | settings
    return model.generate(
        ids,
        attention_mask=mask,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )


def wanted(policy, raw, rows, prompt, samples=None):
    """Tempered log probabilities of a step, with states rebuilt from the tokens."""
    states = [
        policy.state(row[:prompt], row[prompt:], sample=i % samples if samples else 0)
        for i, row in enumerate(rows.tolist())
    ]
    return temper_logits(policy, raw, states)[0].log_softmax(-1)
