"""The queues of compute and load: with everything resident, the serial loop is all."""
