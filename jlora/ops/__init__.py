"""Operations that models are written in: products, embedding look-ups, attention."""
