/* What bindgen reads: the header of the nbdkit that is installed here.
 * The filter ABI has no stability guarantee, so the layout must come from
 * the very version that will load the library.
 */
#include <nbdkit-filter.h>
