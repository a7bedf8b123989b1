"""Two exact sweeps over the DAG, and the operators that feed them blocks of rows."""
