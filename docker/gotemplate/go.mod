module temper-gotemplate

go 1.19
