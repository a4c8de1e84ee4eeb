"""FlashAttention in Triton (Dao 2023), for the lengths that Vision Transformers have."""
