/* flash-kda info */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "json.h"
#include "problem.h"
#include "terminal.h"

static const char help[] =
    "flash-kda info\n"
    "Prints the version, every device with the kernel that would run there (or the\n"
    "reason why none can), and all kernels of this build.\n"
    "\n"
    "flash-kda info --lengths LENGTHS [OPTION...]\n"
    "Says which kernel would run for a shape, why, and how it would lay the work out.\n"
    "Nothing is computed.\n"
    "\n"
    "  --lengths LENGTHS    the tokens of each sequence: 8192, or 1300,547,2048, or\n"
    "                       1024x8 for eight sequences of 1024 tokens\n" HEADS_DEVICE_AND_KERNEL_HELP CUT_HELP
    "  --batch-invariant    asks for results that don't depend on what else is in the\n"
    "                       batch\n"
    "  --longest-unknown    says what runs if the caller does not give the longest\n"
    "                       sequence's length\n"
    "  --decode             says it of flash_kda_decode() instead of the forward pass\n"
    "  --decode-layer       says it of flash_kda_decode_layer()\n"
    "  --writes WHICH       with these: which states are written, last (the default),\n"
    "                       none or each\n"
    "  --bf16-state         with these: the pool of states is bf16 instead of fp32\n" JSON_HELP;

/* Why a device can't be used, after `where`. */
static void print_reason(const char *where, const char *reason)
{
    char text[512];
    snprintf(text, sizeof text, ": %s", reason);
    printf("%s%scan't be used%s", where, bad(), plain());
    print_wrapped(text, (int)(strlen(where) + strlen("can't be used")), 4);
    putchar('\n');
}

static void print_devices(void)
{
    int count;
    const char *no_cuda;
    flash_kda_device_info *infos = list_devices(&count, &no_cuda);
    printf("\n%sDevices%s\n", bold(), plain());
    for (int i = 0; i < count; i++) {
        printf("  ");
        print_device(&infos[i], "", 2);
        if (infos[i].kernel[0])
            printf("\n    runs kernel %s%s%s\n", good(), infos[i].kernel, plain());
        else
            print_reason("\n    ", infos[i].reason);
    }
    if (*no_cuda) print_reason("  cuda: ", no_cuda);
    free(infos);
}

static void json_devices(void)
{
    int count;
    const char *no_cuda;
    flash_kda_device_info *infos = list_devices(&count, &no_cuda);
    json_open_array("devices");
    for (int i = 0; i < count; i++) {
        json_open_object(NULL);
        json_device(&infos[i]);
        json_text("kernel", infos[i].kernel[0] ? infos[i].kernel : NULL);
        json_text("reason", infos[i].reason[0] ? infos[i].reason : NULL);
        json_close_object();
    }
    json_close_array();
    json_text("no_cuda", *no_cuda ? no_cuda : NULL);
    free(infos);
}

static flash_kda_kernel_info *list_kernels(int32_t *count)
{
    must(flash_kda_list_kernels(NULL, 0, count));
    flash_kda_kernel_info *infos = allocate((size_t)*count, sizeof *infos);
    for (int i = 0; i < *count; i++) infos[i].struct_size = sizeof *infos;
    must(flash_kda_list_kernels(infos, *count, count));
    return infos;
}

static void print_kernels(void)
{
    int32_t count;
    flash_kda_kernel_info *infos = list_kernels(&count);
    printf("\n%sKernels%s\n", bold(), plain());
    bool cuda = false;
    for (int i = 0; i < count; i++) {
        cuda = cuda || infos[i].device_type == FLASH_KDA_CUDA;
        char text[512];
        const int indent =
            printf("  %-15s %-5s ", infos[i].name, infos[i].device_type == FLASH_KDA_CUDA ? "cuda" : "cpu");
        snprintf(text, sizeof text, "%s: %s\n", infos[i].archs, infos[i].description);
        print_wrapped(text, indent, indent);
    }
    if (!cuda) printf("  This build has no CUDA kernels: nvcc did not work, or FLASH_KDA_CUDA was off.\n");
    free(infos);
}

static void json_kernels(void)
{
    int32_t count;
    flash_kda_kernel_info *infos = list_kernels(&count);
    json_open_array("kernels");
    for (int i = 0; i < count; i++) {
        json_open_object(NULL);
        json_text("name", infos[i].name);
        json_text("device_type", infos[i].device_type == FLASH_KDA_CUDA ? "cuda" : "cpu");
        json_text("archs", infos[i].archs);
        json_text("description", infos[i].description);
        json_close_object();
    }
    json_close_array();
    free(infos);
}

/* What the options of `info` ask for. */
typedef struct question {
    flash_kda_device_info device; /* struct_size 0: not given */
    const char *lengths, *kernel; /* NULL: not given */
    int64_t heads;                /* 0: not given */
    flash_kda_cut cut;
    bool cut_given, batch_invariant, longest_unknown, json;
    bool decode, decode_layer, bf16_state;
    const char *writes; /* NULL: not given */
} question;

static void print_explanation(const question *asked, const flash_kda_device_info *device, int64_t sequences,
                              int64_t tokens, int64_t heads, const char *words)
{
    if (asked->json) {
        json_text("explanation", words);
        json_close_object();
        return;
    }
    printf("%s", bold());
    print_device(device, "", 0);
    printf("%s\n%lld %s, %lld tokens in all, %lld %s\n\n", plain(), (long long)sequences,
           sequences == 1 ? "sequence" : "sequences", (long long)tokens, (long long)heads,
           heads == 1 ? "head" : "heads");
    print_wrapped(words, 0, 0);
}

/* The members of the JSON object that all explanations have. */
static void open_json(const flash_kda_device_info *device, int64_t sequences, int64_t tokens, int64_t heads)
{
    json_open_object(NULL);
    json_device(device);
    json_integer("sequences", sequences);
    json_integer("tokens", tokens);
    json_integer("heads", heads);
}

static flash_kda_write_states writes_option(const char *text)
{
    static const char *const names[] = {"last", "none", "each"};
    for (int i = 0; i < 3; i++)
        if (!text || strcmp(text, names[i]) == 0) return (flash_kda_write_states)i;
    die("--writes is '%s'; it must be last, none or each", text);
}

/* A tensor that is there, and whose memory nobody looks at. */
static flash_kda_tensor tensor_without_memory(flash_kda_dtype dtype, int ndim, const int64_t *shape)
{
    static char memory;
    return tensor_of(&memory, dtype, ndim, shape);
}

/* What decode or decode_layer would do. Sequences of one length are [N, T]; others come with cu_seqlens. */
static void explain_decode(const question *asked)
{
    char words[1200];
    int64_t *lengths, tokens = 0, longest = 0, count = lengths_option(asked->lengths, &lengths);
    bool equal = true;
    for (int64_t n = 0; n < count; n++) {
        tokens += lengths[n];
        if (lengths[n] > longest) longest = lengths[n];
        equal = equal && lengths[n] == lengths[0];
    }
    free(lengths);
    const flash_kda_device_info device = asked->device.struct_size ? asked->device : best_device();
    const int64_t heads = asked->heads ? asked->heads : default_heads(device.device),
                  channels = 3 * heads * DIM;
    const flash_kda_write_states writes = writes_option(asked->writes);
    const bool each = writes == FLASH_KDA_WRITE_EACH;
    const int64_t columns = longest ? longest : 1, slots = each ? count * columns : count;
    const int64_t rows[] = {equal ? count : 1, equal ? longest : tokens, heads, DIM},
                  x[] = {rows[0], rows[1], channels}, states[] = {slots, heads, DIM, DIM},
                  windows[] = {slots, channels, 3}, weight[] = {channels, 4}, bias[] = {heads, DIM},
                  indices[] = {count, columns}, borders = count + 1, dim = DIM;
    const flash_kda_dtype of_state = asked->bf16_state ? FLASH_KDA_BF16 : FLASH_KDA_F32;
    flash_kda_decode_params d = {
        .struct_size = sizeof d,
        .device = device.device,
        .q = tensor_without_memory(FLASH_KDA_BF16, 4, rows),
        .beta = tensor_without_memory(FLASH_KDA_BF16, 3, rows),
        .A_log = tensor_without_memory(FLASH_KDA_F32, 1, bias),
        .dt_bias = tensor_without_memory(FLASH_KDA_F32, 2, bias),
        .state = tensor_without_memory(of_state, 4, states),
        .write_states = writes,
        .kernel = asked->kernel,
    };
    d.k = d.v = d.g = d.out = d.q;
    if (each) d.state_indices = tensor_without_memory(FLASH_KDA_I32, 2, indices);
    if (!equal) d.cu_seqlens = tensor_without_memory(FLASH_KDA_I32, 1, &borders);
    const flash_kda_decode_layer_params layer = {
        .struct_size = sizeof layer,
        .device = device.device,
        .x = tensor_without_memory(FLASH_KDA_BF16, 3, x),
        .weight = tensor_without_memory(FLASH_KDA_F32, 2, weight),
        .conv_state = tensor_without_memory(FLASH_KDA_BF16, 3, windows),
        .g = d.g,
        .beta = d.beta,
        .out = d.out,
        .A_log = d.A_log,
        .dt_bias = d.dt_bias,
        .output_gate = d.g,
        .norm_weight = tensor_without_memory(FLASH_KDA_F32, 1, &dim),
        .state = d.state,
        .state_indices = d.state_indices,
        .cu_seqlens = d.cu_seqlens,
        .write_states = writes,
        .kernel = asked->kernel,
    };
    if (asked->decode_layer)
        must(flash_kda_explain_decode_layer(&layer, words, sizeof words));
    else
        must(flash_kda_explain_decode(&d, words, sizeof words));
    if (asked->json) open_json(&device, count, tokens, heads);
    print_explanation(asked, &device, count, tokens, heads, words);
}

static void explain(const question *asked)
{
    char words[1200];
    size_t workspace;
    int64_t *lengths, count = lengths_option(asked->lengths, &lengths);
    const flash_kda_device_info device = asked->device.struct_size ? asked->device : best_device();
    const int64_t heads = asked->heads ? asked->heads : default_heads(device.device);
    flash_kda_fwd_params params = shape_params(lengths, count, heads);
    free(lengths);
    if (asked->longest_unknown) params.max_seqlen = 0;
    params.device = device.device;
    params.kernel = asked->kernel;
    params.cut = asked->cut;
    params.batch_invariant = asked->batch_invariant;
    must(flash_kda_explain(&params, words, sizeof words));
    if (asked->json) {
        must(flash_kda_fwd_workspace_size(&params, &workspace));
        open_json(&device, count, params.q.shape[1], heads);
        json_integer("workspace_bytes", (int64_t)workspace);
    }
    print_explanation(asked, &device, count, params.q.shape[1], heads, words);
}

/* Refuses options of decode without one that asks for it, and options of the forward pass with it. */
static void refuse_of_the_other_pass(const question *asked)
{
    const bool decode = asked->decode || asked->decode_layer;
    const char *of_decode = asked->writes ? "--writes" : asked->bf16_state ? "--bf16-state" : NULL;
    const char *of_forward = asked->cut_given         ? "--cut"
                             : asked->batch_invariant ? "--batch-invariant"
                             : asked->longest_unknown ? "--longest-unknown"
                                                      : NULL;
    if (!decode && of_decode) die("%s needs --decode or --decode-layer", of_decode);
    if (decode && of_forward) die("%s is of the forward pass; it does not go with --decode", of_forward);
    if (asked->decode && asked->decode_layer) die("--decode and --decode-layer are two calls; give one");
}

/* Refuses the options that only say more about a shape, if there is no shape. */
static void refuse_without_lengths(const question *asked)
{
    const char *given = asked->heads                ? "--heads"
                        : asked->kernel             ? "--kernel"
                        : asked->cut_given          ? "--cut"
                        : asked->batch_invariant    ? "--batch-invariant"
                        : asked->longest_unknown    ? "--longest-unknown"
                        : asked->device.struct_size ? "--device"
                        : asked->decode             ? "--decode"
                        : asked->decode_layer       ? "--decode-layer"
                                                    : NULL;
    if (given) die("%s needs --lengths, for example --lengths 8192", given);
}

int command_info(int argc, char **argv)
{
    static const struct option options[] = {
        DEVICE_OPTION,
        KERNEL_OPTION,
        CUT_OPTION,
        BATCH_INVARIANT_OPTION,
        JSON_OPTION,
        {"longest-unknown", no_argument, NULL, 'u'},
        {"decode", no_argument, NULL, 'D'},
        {"decode-layer", no_argument, NULL, 'L'},
        {"writes", required_argument, NULL, 'w'},
        {"bf16-state", no_argument, NULL, 'b'},
        {"heads", required_argument, NULL, 'H'},
        {"lengths", required_argument, NULL, 'l'},
        HELP_OPTION,
        {0},
    };
    question asked = {.cut = FLASH_KDA_CUT_AUTO};
    for (int c; (c = getopt_long(argc, argv, ":h", options, NULL)) != -1;) {
        switch (c) {
        case 'h': fputs(help, stdout); return 0;
        case 'd': asked.device = find_device(device_option(optarg)); break;
        case 'k': asked.kernel = optarg; break;
        case 'c':
            asked.cut = cut_option(optarg);
            asked.cut_given = true;
            break;
        case 'i': asked.batch_invariant = true; break;
        case 'u': asked.longest_unknown = true; break;
        case 'D': asked.decode = true; break;
        case 'L': asked.decode_layer = true; break;
        case 'w': asked.writes = optarg; break;
        case 'b': asked.bf16_state = true; break;
        case 'j': asked.json = true; break;
        case 'H': asked.heads = heads_option(optarg); break;
        case 'l': asked.lengths = optarg; break;
        default: refuse_option("info", argv, options, c);
        }
    }
    if (optind < argc) die("info takes no argument, but there is '%s'", argv[optind]);
    refuse_of_the_other_pass(&asked);
    if (asked.lengths) {
        (asked.decode || asked.decode_layer ? explain_decode : explain)(&asked);
        return 0;
    }
    refuse_without_lengths(&asked);
    if (asked.json) {
        json_open_object(NULL);
        json_text("version", flash_kda_version());
        json_devices();
        json_kernels();
        json_close_object();
        return 0;
    }
    printf("flash_kda %s\n", flash_kda_version());
    print_devices();
    print_kernels();
    return 0;
}
