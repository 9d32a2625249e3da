"""A decoder as model files for transformers 4 are written: listed experts, old imports, old caches.

Written for these tests. `block` of the config says how a layer routes: "summed" is a linear gate with the choice made
in the block, "choosing" a gate that chooses by itself; "unknown" squares its scores, which no one expects.
"""

import math

import torch
from torch import nn
from torch.nn.functional import linear, silu, softmax
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_listed import ListedConfig

assert is_torch_fx_available() in (True, False)


class Expert(nn.Module):
    def __init__(self, config, width=1):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, width * config.inner, bias=False)
        self.w2 = nn.Linear(width * config.inner, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, width * config.inner, bias=False)

    def forward(self, x):
        return self.w2(silu(self.w1(x)) * self.w3(x))


class SummedBlock(nn.Module):
    """A linear gate; weights and choice come about in the block, the sum over experts without gradients."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_experts)])

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        scores = softmax(self.gate(x), dim=1, dtype=torch.float)
        if self.config.block == "unknown":
            scores = scores**2
        weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = (weights * self.config.routed_scaling_factor).to(x.dtype)
        return self.infer(x, chosen.flatten(), weights.view(-1, 1)).view_as(hidden_states)

    @torch.no_grad()
    def infer(self, x, chosen, weights):
        total = torch.zeros_like(x)
        order, ends = chosen.argsort(), chosen.bincount(minlength=len(self.experts)).cumsum(0).tolist()
        rows, start = order // self.config.num_experts_per_tok, 0
        for expert, end in zip(self.experts, ends):  # noqa: B905
            if end > start:
                y = expert(x[rows[start:end]]).mul_(weights[order[start:end]])
                total.scatter_add_(0, rows[start:end].view(-1, 1).expand_as(y), y)
            start = end
        return total


class ChoosingGate(nn.Module):
    """A gate that returns the chosen experts and their weights: by groups, with a bias of the choice."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.n_group, self.topk_group = config.groups, max(1, config.groups // 2)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        logits = linear(hidden_states.view(-1, width).float(), self.weight.float(), None)
        scores = logits.sigmoid()
        for_choice = scores + self.e_score_correction_bias
        if self.n_group > 1:
            grouped = for_choice.view(batch * length, self.n_group, -1)
            best = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.topk_group, dim=-1)[1]
            mask = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1)[..., None].expand_as(grouped)
            for_choice = for_choice.masked_fill(mask.flatten(1) == 0, -torch.inf)
        chosen = for_choice.topk(self.config.num_experts_per_tok, dim=-1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.config.routed_scaling_factor


class ChoosingBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = ChoosingGate(config)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_experts)])
        if config.n_shared:
            self.shared_experts = Expert(config, config.n_shared)

    def forward(self, hidden_states):
        chosen, weights = self.gate(hidden_states)
        x = hidden_states.view(-1, hidden_states.shape[-1])
        y = self.infer(x, chosen, weights).view_as(hidden_states)
        return y + self.shared_experts(hidden_states) if hasattr(self, "shared_experts") else y

    @torch.no_grad()
    def infer(self, x, chosen, weights):
        order = chosen.flatten().argsort()
        sorted_x, outputs, start = x[order // chosen.shape[1]], [], 0
        for expert, n in zip(self.experts, chosen.flatten().bincount(minlength=len(self.experts)).tolist()):  # noqa: B905
            if n:
                outputs.append(expert(sorted_x[start : start + n]))
            start += n
        y = torch.empty_like(torch.cat(outputs))
        y[order] = torch.cat(outputs)
        return (y.view(*chosen.shape, -1).type(weights.dtype) * weights[..., None]).sum(1).type(x.dtype)


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


RMSNorm = Norm


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, attention_mask, past_key_value, output_attentions=False):
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if past_key_value is not None:
            past_key_value.get_usable_length(length, self.layer_idx)
            k, v = past_key_value.update(k, v, self.layer_idx)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + attention_mask
        weights = softmax(scores, -1, dtype=torch.float).to(v.dtype)
        y = self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return y, weights if output_attentions else None, past_key_value


class Layer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        block = ChoosingBlock if config.block == "choosing" else SummedBlock
        self.mlp = block(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)

    def forward(self, x, attention_mask, past_key_value, output_attentions=False):
        y, weights, past = self.self_attn(self.input_layernorm(x), attention_mask, past_key_value, output_attentions)
        x = x + y
        x = x + self.mlp(self.post_attention_layernorm(x))
        return (x, weights, past) if output_attentions else (x, past)


class ListedPreTrainedModel(PreTrainedModel):
    config_class = ListedConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.25)


class ListedModel(ListedPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(512, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, output_attentions):
        legacy = use_cache and not isinstance(past_key_values, Cache)
        if legacy:
            past_key_values = DynamicCache.from_legacy_cache(past_key_values)
        past = past_key_values.get_seq_length() if use_cache else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
        x = self.embed_tokens(input_ids) + self.positions(position_ids)
        mask = _prepare_4d_causal_attention_mask(attention_mask, input_ids.shape, x, past)
        seen = ()
        for layer in self.layers:
            x, *rest = layer(x, mask, past_key_values if use_cache else None, output_attentions)
            seen += (rest[0],) if output_attentions else ()
        cache = (past_key_values.to_legacy_cache() if legacy else past_key_values) if use_cache else None
        return BaseModelOutputWithPast(self.norm(x), cache, attentions=seen or None)


class ListedForCausalLM(ListedPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = ListedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new):
        self.lm_head = new

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True,
        output_attentions=False, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, output_attentions)
        logits = self.lm_head(out.last_hidden_state).float()
        return CausalLMOutputWithPast(None, logits, out.past_key_values, attentions=out.attentions)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        if isinstance(past_key_values, Cache):
            cache_length, past_length = past_key_values.get_seq_length(), past_key_values.seen_tokens
            limit = past_key_values.get_max_length()
            input_ids = input_ids[:, past_length:]
            if limit is not None and cache_length + input_ids.shape[1] > limit:
                attention_mask = attention_mask[:, -limit:]
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return {
            "input_ids": input_ids, "position_ids": positions, "past_key_values": past_key_values,
            "attention_mask": attention_mask, "use_cache": kwargs.get("use_cache"),
        }  # fmt: skip
