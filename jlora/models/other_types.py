"""What models of types that are not supported are, for the error that refuses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MULTIMODAL = "a multimodal model of a type that is not implemented"
ENCODER_DECODER = "an encoder-decoder model"

# llama4_text lacks chunked attention, queries scaled by position, and another kind of mixture.
_KINDS = {
    MULTIMODAL: """aria aya_vision blip blip-2 chameleon cohere2_vision deepseek_vl emu3 florence2
        fuyu gemma3n gemma4 glm46v glm4v glm4v_moe granite_speech idefics idefics2 idefics3
        instructblip internvl janus kimi_k25 kosmos-2 lfm2_vl llama4 llava llava_next
        llava_next_video llava_onevision mllama molmo2 moshi ovis2 paligemma perception_lm
        phi4_multimodal pixtral qwen2_5_omni qwen2_audio qwen3_5 qwen3_5_moe qwen3_omni_moe
        qwen3_vl_moe shieldgemma2 smolvlm t5gemma2 video_llava vipllava vision-encoder-decoder
        voxtral""",
    "a speech model": "hubert musicgen seamless_m4t seamless_m4t_v2 speecht5 wav2vec2 whisper",
    "a vision model": "clip convnext deit detr dinov2 dinov3_vit resnet siglip siglip2 swin vit",
    ENCODER_DECODER: """bart bigbird_pegasus blenderbot encoder-decoder fsmt led longt5 m2m_100
        marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5
        t5gemma umt5""",
    "an encoder, which does not generate text": """albert bert big_bird camembert convbert deberta
        deberta-v2 distilbert electra ernie eurobert flaubert longformer modernbert mpnet nomic_bert
        rembert roberta roformer xlm xlm-roberta xlm-roberta-xl xlnet""",
    "a state-space or recurrent model, or a mixture of one with attention": """bamba falcon_h1
        falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 minimax
        nemotron_h olmo_hybrid qwen3_next recurrent_gemma rwkv xlstm zamba zamba2""",
    "a mixture of experts of a kind that is not implemented": """cohere2_moe dbrx deepseek_v2
        deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite
        granitemoe granitemoeshared hunyuan_v1_moe jetmoe llama4_text longcat_flash minimax_m2
        olmoe phimoe""",
    "a language model of a family that is not implemented": """apertus arcee bitnet bloom codegen
        ctrl cwm diffllama ernie4_5 exaone exaone4 falcon gemma3n_text gemma4_text glm glm4
        gpt_bigcode gpt_neo gptj helium hunyuan_v1_dense internlm internlm2 internlm3 minicpm
        minicpm3 ministral ministral3 mpt nanochat nemotron olmo olmo3 openai-gpt persimmon qwen
        seed_oss smollm vaultgemma xglm baichuan chatglm""",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def what_is(hf: Mapping[str, Any]) -> str | None:
    """The kind of model that a ``config.json`` describes, in words; None if it does not show."""
    known = _KIND_OF.get(str(hf.get("model_type")))
    if known is None and ("vision_config" in hf or "audio_config" in hf):
        return MULTIMODAL
    if known is None and hf.get("is_encoder_decoder") is True:
        return ENCODER_DECODER
    return known
