"""How the shipped base model was made and measured."""
