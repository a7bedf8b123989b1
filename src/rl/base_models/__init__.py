"""How the shipped base models were made and measured: one recipe a task, one mechanism for all."""
