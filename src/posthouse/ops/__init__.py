"""Operations on a running site: one module per verb."""
