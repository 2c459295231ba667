"""The smallest model that has every kind of operator; tests change what they need."""

from fairseq_lowbit.models import Architecture

TINY = Architecture(
    conv_feature_layers="[(8,10,5),(8,3,2),(12,2,2)]",
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    conv_pos=6,
    conv_pos_groups=4,
    final_dim=8,
)
