"""Operations on a running site: each is prechecked, planned, shown, acted on one node at a time, and verified."""
