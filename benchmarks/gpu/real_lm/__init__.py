"""The protocol that asks whether token credit pays on a real language model."""
