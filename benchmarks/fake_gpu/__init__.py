"""What a GPU would be asked for, counted on a machine without one."""
